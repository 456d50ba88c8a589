//! How this process stands in the queue for a processor.
//!
//! **In short turns where others wait for a processor.** What a disk's thread does takes
//! microseconds, and a guest waits for it. A thread that asks for short turns gets its turn sooner,
//! and no more of the processor (Linux 6.12 and later: the custom slice of EEVDF; earlier kernels
//! take no notice). It holds for the threads that serve, and for the death of the process, in which
//! each thread has to get a turn before the image is free. Where a processor is free, short turns
//! bring nothing and cost: a write with O_DIRECT at depth 1 takes 130 instead of 85 µs. So a thread
//! that serves asks for them while there are more threads than processors.
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

/// `turn`: in ns; 0 for what the kernel gives everybody.
fn set_ordinary(turn: u64) -> io::Result<()> {
    // SAFETY: no memory is passed.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let policy = libc::SCHED_OTHER as u32;
    set(Attributes { policy, nice, runtime: turn, ..Attributes::default() })
}

/// Has the calling thread, and the threads that it starts from now on, ask for short turns.
pub(crate) fn ask_for_short_turns() {
    if let Err(error) = set_ordinary(TURN) {
        log::info!("on a busy host requests wait for longer turns error=\"{error}\"");
    }
}

/// How long the turns are that a thread asks for.
#[derive(Debug)]
pub(crate) struct Turns {
    short: bool,
}

impl Turns {
    /// Of a thread whose process has asked for short ones.
    pub(crate) fn short() -> Self {
        Self { short: true }
    }

    /// Short turns for the calling thread while others wait for a processor (`contended`), ordinary
    /// ones otherwise. To be called by one thread, and not while it runs before others.
    pub(crate) fn suit(&mut self, contended: bool) {
        if self.short != contended {
            self.short = contended;
            // A refusal was told when the process began, and changes nothing here.
            let _ = set_ordinary(if contended { TURN } else { 0 });
        }
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
            && let Err(error) = set_ordinary(TURN)
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

    /// The turn that the kernel has noted for the calling thread, in ns; 0 before Linux 6.12.
    fn turn() -> u64 {
        let mut attributes = Attributes::default();
        let size = size_of::<Attributes>() as u32;
        let pointer = &raw mut attributes;
        // SAFETY: the structure has the size that is passed, and lives across the call.
        let result = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, pointer, size, 0) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        attributes.runtime
    }

    #[test]
    fn turns_are_short_while_others_wait_for_a_processor() {
        let ordinary = turn();
        ask_for_short_turns();
        let short = turn();
        // A kernel without custom slices says nothing of them.
        assert!(short == TURN || (ordinary, short) == (0, 0), "{ordinary} {short}");
        let mut turns = Turns::short();
        for (contended, expected) in
            [(true, short), (false, ordinary), (false, ordinary), (true, short)]
        {
            turns.suit(contended);
            assert_eq!(turn(), expected);
        }
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
