//! How this process stands in the queue for a processor.
//!
//! **Always in short turns.** What a disk's thread does takes microseconds, and a guest waits for it.
//! A thread that asks for short turns gets its turn sooner, and no more of the processor (Linux 6.12
//! and later: the custom slice of EEVDF; earlier kernels take no notice). It holds for the threads
//! that serve, and for the death of the process, in which each thread has to get a turn before the
//! image is free.
//!
//! **Before everybody else for the moment of a take-over.** A guest that waits for its disk waits for
//! four threads in turn: the one that gets the image's lock, the one that serves its queue, QEMU's,
//! and its own. On a busy host each of the first two stands behind whoever has the processor, where
//! the work of both takes 0.3 ms. So the threads of a spare wait with real-time priority (the lowest
//! there is), which costs nothing while they sleep, and give it back as soon as they have done what
//! the guest waits for. The first thread takes it, for which it needs CAP_SYS_NICE or RLIMIT_RTPRIO
//! (without them a take-over waits its turn); the threads that serve queues inherit it, and need
//! neither. A thread that would not give it back gets no more of a second than `sched_rt_runtime_us`
//! allows.

use std::io;

/// A turn, in ns: the shortest that the kernel gives.
const TURN: u64 = 100_000;

/// `struct sched_attr` of sched_setattr(2), in its first form.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Of the calling thread.
fn set(attributes: Attributes) -> io::Result<()> {
    let attributes = Attributes { size: size_of::<Attributes>() as u32, ..attributes };
    // SAFETY: the structure has the size that it says, and lives across the call.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set_ordinary() -> io::Result<()> {
    // SAFETY: no memory is passed.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let policy = libc::SCHED_OTHER as u32;
    set(Attributes { policy, nice, runtime: TURN, ..Attributes::default() })
}

/// Has the calling thread, and the threads that it starts from now on, ask for short turns.
pub(crate) fn ask_for_short_turns() {
    if let Err(error) = set_ordinary() {
        log::info!("on a busy host requests wait for longer turns error=\"{error}\"");
    }
}

/// Whether the calling thread runs before others.
#[derive(Debug, Default)]
pub(crate) struct Urgency {
    raised: bool,
}

impl Urgency {
    /// Has the calling thread, and the threads that it starts from now on, run before others, if it
    /// may.
    pub(crate) fn raise() -> Self {
        let policy = libc::SCHED_FIFO as u32;
        match set(Attributes { policy, priority: 1, ..Attributes::default() }) {
            Ok(()) => Self { raised: true },
            Err(error) => {
                log::info!("a take-over will wait its turn on a busy host error=\"{error}\"");
                Self::default()
            }
        }
    }

    /// As whoever has started the calling thread.
    pub(crate) fn inherited() -> Self {
        // SAFETY: no memory is passed.
        Self { raised: unsafe { libc::sched_getscheduler(0) } == libc::SCHED_FIFO }
    }

    /// Has `act` carried out by a thread that does not run before others, and so the threads that
    /// are started there.
    pub(crate) fn without<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        if !self.raised {
            return act();
        }
        let aside = || {
            Self::inherited().lower();
            act()
        };
        std::thread::scope(|scope| match scope.spawn(aside).join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    }

    /// Back to where others are; to be called by the same thread.
    pub(crate) fn lower(&mut self) {
        if std::mem::take(&mut self.raised)
            && let Err(error) = set_ordinary()
        {
            log::error!("a thread keeps running before others error=\"{error}\"");
        }
    }

    pub(crate) fn is_raised(&self) -> bool {
        self.raised
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> i32 {
        // SAFETY: no memory is passed.
        unsafe { libc::sched_getscheduler(0) & !libc::SCHED_RESET_ON_FORK }
    }

    #[test]
    fn a_thread_goes_back_to_where_it_was() {
        ask_for_short_turns();
        assert_eq!(policy(), libc::SCHED_OTHER);
        let mut urgency = Urgency::raise();
        let raised = if urgency.is_raised() { libc::SCHED_FIFO } else { libc::SCHED_OTHER };
        assert_eq!(policy(), raised);
        let inherits = || {
            let mut urgency = Urgency::inherited();
            let was = (policy(), urgency.is_raised());
            urgency.lower();
            (was, policy())
        };
        let began = (raised, urgency.is_raised());
        assert_eq!(std::thread::spawn(inherits).join().unwrap(), (began, libc::SCHED_OTHER));
        let beside = || std::thread::spawn(policy).join().unwrap();
        assert_eq!(
            urgency.without(|| (policy(), beside())),
            (libc::SCHED_OTHER, libc::SCHED_OTHER)
        );
        assert_eq!(policy(), raised);
        urgency.lower();
        assert_eq!((policy(), urgency.is_raised()), (libc::SCHED_OTHER, false));
    }
}
