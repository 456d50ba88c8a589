//! seccomp: from the tables of `calls` to a filter in force.
//!
//! A call that is not in the table is not carried out: the kernel sends SIGSYS to the thread that made
//! it, whose handler says which call it was, as the last line of the log, and ends the process (exit
//! status 1). The next process takes over, as after any death. An attacker can have another handler;
//! the call is not carried out either way.
//!
//! Since Linux 5.11 the kernel remembers which calls a filter allows whatever their arguments are, and
//! does not run it for these: all that the data path uses are such.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

use crate::calls::{Call, Kind, QUIETLY, Word};
use crate::{Standing, attempt};

type Made<T> = Result<T, seccompiler::BackendError>;

pub(crate) fn install(tables: &[&[Call]], standing: &mut Standing) {
    let apply = |filter: Made<BpfProgram>| {
        filter.map_err(|error| error.to_string()).and_then(|program| {
            apply_filter(&program).map_err(|error| match error {
                seccompiler::Error::Seccomp(cause) => cause.to_string(),
                other => other.to_string(),
            })
        })
    };
    tell_before_the_end();
    // The one that says "there is no such call" first: the other lets these through.
    let installed = apply(quiet()).and_then(|()| apply(compile(tables)));
    standing.seccomp = attempt(standing, "seccomp", installed).is_some();
}

fn architecture() -> Made<TargetArch> {
    std::env::consts::ARCH.try_into()
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Made<SeccompCondition> {
    SeccompCondition::new(argument, Length::Dword, operator, value)
}

fn rules(kind: Kind) -> Made<Vec<SeccompRule>> {
    // One rule for each word of which any will do.
    let any = |argument, mask: Option<u64>, values: &[u64]| {
        values
            .iter()
            .map(|&value| {
                let operator = mask.map_or(SeccompCmpOp::Eq, SeccompCmpOp::MaskedEq);
                SeccompRule::new(vec![condition(argument, operator, value)?])
            })
            .collect::<Made<Vec<_>>>()
    };
    match kind {
        Kind::Always => Ok(Vec::new()),
        Kind::Quietly => Ok(Vec::new()),
        Kind::One(argument, values) => any(argument, None, values),
        Kind::Masked(argument, mask, value) => any(argument, Some(mask), &[value]),
        Kind::Own(argument) => any(argument, None, &[u64::from(std::process::id())]),
        Kind::Both(Word(first, mask, value), Word(second, other_mask, other)) => {
            Ok(vec![SeccompRule::new(vec![
                condition(first, SeccompCmpOp::MaskedEq(mask), value)?,
                condition(second, SeccompCmpOp::MaskedEq(other_mask), other)?,
            ])?])
        }
    }
}

fn compile(tables: &[&[Call]]) -> Made<BpfProgram> {
    let mut all: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in tables.iter().flat_map(|table| table.iter()) {
        all.entry(call.number).or_default().extend(rules(call.kind)?);
    }
    let (refused, allowed) = (SeccompAction::Trap, SeccompAction::Allow);
    SeccompFilter::new(all, refused, allowed, architecture()?)?.try_into()
}

fn quiet() -> Made<BpfProgram> {
    let all = QUIETLY.iter().map(|number| (*number, Vec::new())).collect();
    let (others, these) = (SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32));
    SeccompFilter::new(all, others, these, architecture()?)?.try_into()
}

fn tell_before_the_end() {
    // SAFETY: the structure is plain data; the handler does only what a handler may.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = system_call_is_refused as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut());
    }
}

/// The handler of SIGSYS; no allocation, no lock. Public for its documentation alone.
pub extern "C" fn system_call_is_refused(
    _: libc::c_int,
    info: *mut libc::siginfo_t,
    _: *mut libc::c_void,
) {
    /// Behind signal, errno, code and a pointer: the number of the call.
    const NUMBER: usize = 24;
    // SAFETY: the kernel passes a siginfo_t, and for SIGSYS the number stands there.
    let mut number = unsafe { info.cast::<u8>().add(NUMBER).cast::<u32>().read_unaligned() };
    let mut digits = [0u8; 10];
    let mut first = digits.len();
    loop {
        first -= 1;
        digits[first] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    say(b"semper: error: system call ");
    say(&digits[first..]);
    say(b" is none that this program makes, and was not carried out; report it, with this line\n");
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(1) };
}

fn say(text: &[u8]) {
    // SAFETY: the bytes live across the call. Nobody who reads it is no reason to go on.
    unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
}

/// From now on the calling process can do nothing but wait, close files and end. For one that shares
/// its memory with another, which may be made to write into it: no allocation, no thread-local state.
///
/// # Errors
/// The kernel's.
pub fn refuse_all_but_the_end() -> io::Result<()> {
    const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    const fn step(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
        libc::sock_filter { code, jt, jf, k }
    }
    #[cfg(target_arch = "x86_64")]
    const ARCHITECTURE: u32 = 0xc000_003e; // AUDIT_ARCH_X86_64
    #[cfg(target_arch = "aarch64")]
    const ARCHITECTURE: u32 = 0xc000_00b7; // AUDIT_ARCH_AARCH64
    #[cfg(target_arch = "x86_64")]
    const POLL: libc::c_long = libc::SYS_poll;
    #[cfg(not(target_arch = "x86_64"))]
    const POLL: libc::c_long = libc::SYS_ppoll;
    // Offsets in struct seccomp_data: the number of the call, and its architecture.
    static STEPS: [libc::sock_filter; 14] = [
        step(LOAD, 0, 0, 4),
        step(EQUAL, 0, 10, ARCHITECTURE),
        step(LOAD, 0, 0, 0),
        step(EQUAL, 9, 0, POLL as u32),
        step(EQUAL, 8, 0, libc::SYS_ppoll as u32),
        step(EQUAL, 7, 0, libc::SYS_setpriority as u32),
        step(EQUAL, 6, 0, libc::SYS_nanosleep as u32),
        step(EQUAL, 5, 0, libc::SYS_clock_nanosleep as u32),
        step(EQUAL, 4, 0, libc::SYS_close_range as u32),
        step(EQUAL, 3, 0, libc::SYS_restart_syscall as u32),
        step(EQUAL, 2, 0, libc::SYS_exit as u32),
        step(EQUAL, 1, 0, libc::SYS_exit_group as u32),
        step(RETURN, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: STEPS.len() as u16, filter: STEPS.as_ptr().cast_mut() };
    // SAFETY: the kernel reads the program, which lives across the call, and writes nothing.
    let status = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        let mode = libc::SECCOMP_SET_MODE_FILTER;
        libc::syscall(libc::SYS_seccomp, mode, 0, &raw const program)
    };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How a process ends that makes a system call behind [`refuse_all_but_the_end`]: its wait status.
    fn status_after(number: libc::c_long, arguments: [libc::c_long; 3]) -> libc::c_int {
        let [first, second, third] = arguments;
        // SAFETY: the child makes nothing but system calls, and the one that is tried has no pointer.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                if refuse_all_but_the_end().is_err() {
                    libc::_exit(1);
                }
                libc::syscall(number, first, second, third);
                libc::_exit(0);
            }
            let mut status = -1;
            assert_eq!(libc::waitpid(child, &mut status, 0), child);
            status
        }
    }

    #[test]
    fn whoever_shares_the_memory_can_wait_and_end_and_nothing_else() {
        let high = 1 << 20;
        for (number, arguments) in [
            (libc::SYS_close_range, [high, high + 1, 0]),
            (libc::SYS_setpriority, [libc::PRIO_PROCESS.into(), 0, 19]),
            // Fails: there is no memory at that address.
            (libc::SYS_ppoll, [-1, 1, 0]),
            (libc::SYS_nanosleep, [0, 0, 0]),
            (libc::SYS_exit, [0, 0, 0]),
        ] {
            assert_eq!(status_after(number, arguments), 0, "{number}");
        }
        for number in [
            libc::SYS_getpid,
            libc::SYS_read,
            libc::SYS_openat,
            libc::SYS_mmap,
            libc::SYS_socket,
            libc::SYS_clone,
            libc::SYS_execve,
            libc::SYS_kill,
            libc::SYS_ptrace,
            // The other numbers of x86-64 (x32).
            libc::SYS_getpid | 0x4000_0000,
        ] {
            let status = status_after(number, [-1, 0, 0]);
            assert!(libc::WIFSIGNALED(status), "{number}: {status}");
            assert_eq!(libc::WTERMSIG(status), libc::SIGSYS, "{number}");
        }
    }
}
