//! Running before everybody else for the moment of a take-over.
//!
//! A guest that waits for its disk waits for four threads in turn: the one that gets the image's
//! lock, the one that serves its queue, QEMU's, and its own. On a busy host each of the first two
//! stands behind whoever has the processor: a scheduler's slice of 3 ms and more, twice, where the
//! work of both takes 0.3 ms. So the threads of a spare wait with real-time priority (the lowest
//! there is), which costs nothing while they sleep, and give it back as soon as they have done what
//! the guest waits for. Nothing that they start inherits it. A thread that would not give it back
//! gets no more of a second than `sched_rt_runtime_us` allows.
//!
//! It takes CAP_SYS_NICE or RLIMIT_RTPRIO. Without them a take-over waits its turn.

use std::io;

/// Whether the calling thread runs before others.
#[derive(Debug, Default)]
pub(crate) struct Urgency {
    raised: bool,
}

fn set_scheduler(policy: libc::c_int, priority: libc::c_int) -> io::Result<()> {
    // SAFETY: plain data, all zeros but one.
    let mut param: libc::sched_param = unsafe { std::mem::zeroed() };
    param.sched_priority = priority;
    // SAFETY: the structure lives across the call, which concerns the calling thread only.
    match unsafe { libc::sched_setscheduler(0, policy, &raw const param) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Urgency {
    /// Has the calling thread run before others from now on, if it may.
    pub(crate) fn raise() -> Self {
        match set_scheduler(libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, 1) {
            Ok(()) => Self { raised: true },
            Err(error) => {
                log::info!("a take-over will wait its turn on a busy host error=\"{error}\"");
                Self::default()
            }
        }
    }

    /// Back to where others are; to be called by the same thread.
    pub(crate) fn lower(&mut self) {
        if std::mem::take(&mut self.raised)
            && let Err(error) = set_scheduler(libc::SCHED_OTHER, 0)
        {
            log::error!("a thread keeps running before others error=\"{error}\"");
        }
    }

    pub(crate) fn is_raised(&self) -> bool {
        self.raised
    }
}
