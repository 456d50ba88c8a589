//! A process that outlives this one by a moment, to take its memory apart.
//!
//! When a process ends, the kernel first takes its page tables apart and only then closes its
//! files; and the image lock, for which the next backend waits, is a file. The page tables of a
//! backend cover the guest's memory, and with the mapped engine the image: 20 ms for each GiB that
//! was touched, all of it part of the stall that the guest sees. But the page tables belong to
//! whoever shares them last. So a second process shares them from the start (clone(2), CLONE_VM).
//! It has no files, runs no code but a wait for the end of this one, and then ends as well: the
//! lock is free at once, and the memory is taken apart behind the guest's back. Whoever gets hold of
//! the first could write into the second, so that one may ask the kernel for nothing else.
//!
//! The lock still means what it did. A thread that copies or is in a system call keeps its own
//! reference to the locked file until it is gone, and requests of io_uring keep theirs; the second
//! process has none. (Mappings refer to files as well: see `Mapping` in `semper_block`.)

use std::io;

const STACK: usize = 64 << 10;
/// From the end of the process to the end of its memory: a take-over is over by then.
const PAUSE: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 50_000_000 };
/// The lowest of priorities (nice).
const LOWEST: libc::c_int = 19;

/// Starts it. Call once, from the main thread, before the image is opened.
///
/// # Errors
/// The kernel's; the backend works without it, and the next one starts a little later.
pub(crate) fn engage() -> io::Result<()> {
    // SAFETY: plain system calls; each result is checked. The stack is a fresh mapping that lives
    // as long as the memory itself, and the child runs on nothing else.
    unsafe {
        let end = libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0);
        if end < 0 {
            return Err(io::Error::last_os_error());
        }
        let end = end as libc::c_int;
        let stack = libc::mmap(
            std::ptr::null_mut(),
            STACK,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK,
            -1,
            0,
        );
        if stack == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            libc::close(end);
            return Err(error);
        }
        // No signal may run a handler of this program over there; SIGKILL still ends it.
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let top = stack.cast::<u8>().add(STACK).cast();
        // Its end is nobody's business (no signal), and init's to reap.
        // It inherits the name, so that nobody takes it for a backend at any instant.
        let mut name = [0u8; 16];
        libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr());
        libc::prctl(libc::PR_SET_NAME, c"blkd-reaper".as_ptr());
        let child = libc::clone(wait_for_the_end, top, libc::CLONE_VM, end as usize as *mut _);
        let cloned = if child < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        libc::close(end);
        cloned
    }
}

/// Runs in the second process, in the memory of the first: no allocation, no thread-local state,
/// no panic. (errno is shared as well; none of these calls fails on a kernel that has pidfds.)
extern "C" fn wait_for_the_end(end: *mut libc::c_void) -> libc::c_int {
    let end = end.addr() as libc::c_int;
    // SAFETY: system calls on descriptors of this process' own table, and on a local variable.
    unsafe {
        // Before anybody speaks with the other process. (If it cannot be had, neither can the filter
        // of that process, which says so.)
        let _ = semper_walls::refuse_all_but_the_end();
        // Whoever waits for the other end of a pipe or socket must not wait for us.
        libc::syscall(libc::SYS_close_range, 0, end - 1, 0);
        libc::syscall(libc::SYS_close_range, end + 1, libc::c_uint::MAX, 0);
        let mut poll = libc::pollfd { fd: end, events: libc::POLLIN, revents: 0 };
        // Readable when the last thread of the other process is gone, and its files with it.
        while libc::poll(&mut poll, 1, -1) < 1 {}
        // The kernel takes memory apart without a pause: whoever the next backend is, let it get
        // going first, and then whoever has something to do.
        libc::setpriority(libc::PRIO_PROCESS, 0, LOWEST);
        libc::nanosleep(&PAUSE, std::ptr::null_mut());
        // Not exit(): its handlers belong to the other process.
        libc::_exit(0)
    }
}
