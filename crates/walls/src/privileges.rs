//! What a process of root, or of any other user, does not need.

use std::io;

use crate::landing::Ground;
use crate::{Standing, attempt};

/// Version 3 of the kernel's structures: 64 capabilities.
const VERSION: u32 = 0x2008_0522;
/// To use a file whatever its owner and its mode are.
const DAC_OVERRIDE: u32 = 1;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Set {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn set(effective: u32, permitted: u32) -> io::Result<()> {
    let header = Header { version: VERSION, pid: 0 };
    let sets = [Set { effective, permitted, inheritable: 0 }, Set::default()];
    // SAFETY: the kernel reads both structures, which are what this version says.
    match unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn permitted() -> io::Result<u32> {
    let header = Header { version: VERSION, pid: 0 };
    let mut sets = [Set::default(); 2];
    // SAFETY: the kernel writes two sets for this version.
    match unsafe { libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()) } {
        0 => Ok(sets[0].permitted),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives up what can be given up, but for the one capability without which something on `ground`
/// cannot be used: an image of another user's, for example.
pub(crate) fn give_up(ground: &Ground, standing: &mut Standing) {
    // SAFETY: no memory is passed to any of these calls; so below.
    let (no_new_privs, root) =
        unsafe { (libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, libc::geteuid() == 0) };
    standing.no_new_privs = no_new_privs;
    bound();
    // SAFETY: see above.
    unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    let may = permitted().unwrap_or(0) & 1 << DAC_OVERRIDE;
    let mut given_up = set(0, may);
    if given_up.is_ok() && may != 0 {
        let needed = !ground.is_within_reach();
        given_up = if needed { set(may, may) } else { set(0, 0) };
        if needed {
            standing.capabilities = "dac_override";
        }
    }
    attempt(standing, "capabilities", given_up);
    attempt(standing, "core files", no_core_file());
    if root {
        // Of an ordinary user the agent is one as well, and looks at the process under /proc.
        // SAFETY: see above.
        unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
    }
}

/// Gives up what [`give_up`] has left.
pub(crate) fn give_up_the_rest(standing: &mut Standing) {
    attempt(standing, "capabilities", set(0, 0));
}

/// Nothing that is executed gets any. Whoever may not do so has none to pass on.
fn bound() {
    for capability in 0..64 {
        // SAFETY: no memory is passed.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            break;
        }
    }
}

/// A dump holds up the next process, and has parts of the guest's data in it.
fn no_core_file() -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel reads the structure.
    match unsafe { libc::setrlimit(libc::RLIMIT_CORE, &limit) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
