//! How many files this process may have open.
//!
//! Each queue has up to nine: three eventfds of the front end's, once each for the device, for the
//! thread that serves the queue and for the session. A service that asks for nothing may open 1,024.

use std::io;

/// Allows this process as many as it may allow itself.
///
/// # Errors
/// The system's; most disks have few queues.
pub(crate) fn allow_all() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure lives across both calls.
    let status = unsafe {
        match libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) {
            0 => {
                limit.rlim_cur = limit.rlim_max;
                libc::setrlimit(libc::RLIMIT_NOFILE, &limit)
            }
            failed => failed,
        }
    };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
