//! Copying between mapped files: the one place where touching memory may fail.
//!
//! A mapped file can lack a page when it is touched: the file was truncated, its file system is
//! full, its medium failed. The kernel says so with SIGBUS. The handler here knows one
//! instruction, the copy below; a SIGBUS from there becomes a short copy, as in the kernel's own
//! `copy_from_user`. Any other SIGBUS ends the process as it always did.

use std::io;
use std::sync::OnceLock;

std::arch::global_asm!(
    // rdi = to, rsi = from, rdx = bytes; gives in rax the bytes that were not copied.
    ".pushsection .text.semper_copy, \"ax\", @progbits",
    ".p2align 4",
    ".hidden semper_copy_bytes",
    ".hidden semper_copy_access",
    ".hidden semper_copy_stopped",
    ".globl semper_copy_bytes",
    ".globl semper_copy_access",
    ".globl semper_copy_stopped",
    ".type semper_copy_bytes, @function",
    "semper_copy_bytes:",
    "mov rcx, rdx",
    "semper_copy_access:",
    // On a fault rcx counts what is left (Intel SDM, volume 1, 7.3.9.3).
    "rep movsb",
    "semper_copy_stopped:",
    "mov rax, rcx",
    "ret",
    ".size semper_copy_bytes, . - semper_copy_bytes",
    ".popsection",
);

unsafe extern "sysv64" {
    fn semper_copy_bytes(to: *mut u8, from: *const u8, len: usize) -> usize;
    static semper_copy_access: u8;
    static semper_copy_stopped: u8;
}

/// Makes [`copy`] safe to use in this process. Once is enough, for all threads.
///
/// # Errors
/// The kernel's.
pub(crate) fn prepare() -> io::Result<()> {
    static PREPARED: OnceLock<Result<(), i32>> = OnceLock::new();
    PREPARED
        .get_or_init(|| install().map_err(|e| e.raw_os_error().unwrap_or(libc::EINVAL)))
        .map_err(io::Error::from_raw_os_error)
}

fn install() -> io::Result<()> {
    // SAFETY: sigaction is plain data; the handler does only what a handler may.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        match libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

extern "C" fn on_sigbus(
    _signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes the interrupted context, which is ours until we return; the two
    // symbols are addresses of instructions and are never read.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let at = &mut registers[libc::REG_RIP as usize];
        if *at == (&raw const semper_copy_access).addr() as i64 {
            *at = (&raw const semper_copy_stopped).addr() as i64;
        } else {
            // Back to the instruction, which now meets the default action.
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
        }
    }
}

/// Copies `len` bytes; gives the bytes that were copied before a page could not be had.
///
/// # Safety
/// [`prepare`] was called. Both ranges are mapped, `to` writable; what is behind the mappings may
/// fail, and others may change it meanwhile. The ranges do not overlap.
pub(crate) unsafe fn copy(to: *mut u8, from: *const u8, len: usize) -> usize {
    // SAFETY: the caller's promise; a missing page stops the copy, see above.
    len - unsafe { semper_copy_bytes(to, from, len) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::{AsRawFd, FromRawFd};

    use super::*;

    fn map(len: usize) -> (File, *mut u8) {
        // SAFETY: memfd_create returns a new descriptor, which the File then owns.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"copy".as_ptr(), 0)) };
        file.set_len(len as u64).unwrap();
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert_ne!(at, libc::MAP_FAILED);
        (file, at.cast())
    }

    #[test]
    fn a_file_that_ends_under_the_copy_stops_it_at_that_byte() {
        prepare().unwrap();
        let (file, mapped) = map(16 << 10);
        let source: Vec<u8> = (0..16 << 10).map(|n| (n % 251) as u8).collect();
        // SAFETY: both ranges have 16 KiB, and `prepare` was called; so below.
        unsafe {
            assert_eq!(copy(mapped, source.as_ptr(), source.len()), source.len());
            file.set_len(8 << 10).unwrap();
            let mut target = vec![0; 16 << 10];
            let unaligned = mapped.add(100);
            assert_eq!(copy(target.as_mut_ptr(), unaligned, 12 << 10), (8 << 10) - 100);
            assert_eq!(target[..(8 << 10) - 100], source[100..8 << 10]);
            assert_eq!(copy(unaligned, source.as_ptr(), 12 << 10), (8 << 10) - 100);
            assert_eq!(copy(mapped.add(8 << 10), source.as_ptr(), 1), 0);
        }
    }

    #[test]
    fn any_other_sigbus_still_ends_the_process() {
        prepare().unwrap();
        let (file, mapped) = map(4096);
        file.set_len(0).unwrap();
        // SAFETY: the child only touches the page and must die of it.
        let status = unsafe {
            match libc::fork() {
                0 => {
                    mapped.write_volatile(1);
                    libc::_exit(0)
                }
                child => {
                    let mut status = 0;
                    assert_eq!(libc::waitpid(child, &mut status, 0), child);
                    status
                }
            }
        };
        assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS);
    }
}
