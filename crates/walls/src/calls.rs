//! Which system calls each program makes after it has begun, and why.
//!
//! What is not here is refused: above all to execute, to trace, to signal others, to mount, to make
//! namespaces, to load modules or programs of the kernel (bpf), kexec, keys, clocks, io_uring_setup
//! and userfaultfd (both are opened before), memory of other processes, sockets of other families,
//! memory that can be executed.

/// A call, when it is allowed, and why.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub number: libc::c_long,
    pub kind: Kind,
    #[cfg_attr(not(test), expect(dead_code, reason = "for whoever reads the table"))]
    pub why: &'static str,
}

/// When.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// Whatever its arguments are: the kernel remembers it, and does not run the filter.
    Always,
    /// It passes here, and is told by [`QUIETLY`] that there is no such call.
    Quietly,
    /// An argument is one of these.
    One(u8, &'static [u64]),
    /// These bits of an argument have this value.
    Masked(u8, u64, u64),
    /// An argument is this process' own number.
    Own(u8),
    /// The same of two.
    Both(Word, Word),
}

/// Number of an argument, the bits that count, and their value.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Word(pub u8, pub u64, pub u64);

/// Calls that a library tries first and can do without: "there is no such call".
pub(crate) const QUIETLY: &[libc::c_long] = &[
    // Its flags are in memory, where no filter sees them; the library then takes clone(2).
    libc::SYS_clone3,
];

const fn always(number: libc::c_long, why: &'static str) -> Call {
    Call { number, kind: Kind::Always, why }
}

const fn when(number: libc::c_long, kind: Kind, why: &'static str) -> Call {
    Call { number, kind, why }
}

const THREAD: u64 = libc::CLONE_THREAD as u64;
const NAMESPACES: u64 = (libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP) as u64;
const FAMILY_UNIX: Word = Word(0, u64::MAX >> 32, libc::AF_UNIX as u64);
/// SOCK_STREAM and SOCK_SEQPACKET, with or without their flags.
const STREAM: Word = Word(1, 0xf, libc::SOCK_STREAM as u64);
const PACKETS: Word = Word(1, 0xf, libc::SOCK_SEQPACKET as u64);
const EXECUTE: u64 = libc::PROT_EXEC as u64;
/// Names memory of the C library, in kernels that know it.
const PR_SET_VMA: u64 = 0x5356_4d41;

const CONTROLS: &[u64] = &[
    libc::F_DUPFD_CLOEXEC as u64, // descriptors that several threads have
    libc::F_GETFD as u64,
    libc::F_SETFD as u64,
    libc::F_GETFL as u64,
    libc::F_SETFL as u64,
    libc::F_OFD_SETLK as u64, // the image's lock, and the record's
    libc::F_OFD_SETLKW as u64,
    libc::F_OFD_GETLK as u64,
    libc::F_ADD_SEALS as u64, // memory that outlives the process
    libc::F_GET_SEALS as u64,
];

/// Of every program: what its language and its C library ask for, and files that it has.
pub(crate) const ALL: &[Call] = &[
    always(libc::SYS_read, "files, sockets, eventfds"),
    always(libc::SYS_write, "files, sockets, eventfds, the log"),
    always(libc::SYS_readv, "the same, in parts"),
    always(libc::SYS_writev, "the same, in parts"),
    always(libc::SYS_pread64, "images, at a place"),
    always(libc::SYS_pwrite64, "images, at a place"),
    always(libc::SYS_preadv, "the same, in parts"),
    always(libc::SYS_pwritev, "the same, in parts"),
    always(libc::SYS_lseek, "sizes; where there is data"),
    always(libc::SYS_fsync, "what was written is to last"),
    always(libc::SYS_fdatasync, "the same"),
    always(libc::SYS_ftruncate, "the size of files that are made, and of images that grow"),
    always(libc::SYS_fallocate, "discards, zeroes, room"),
    always(libc::SYS_fadvise64, "the page cache of an image"),
    always(libc::SYS_fstat, "what a file is"),
    always(libc::SYS_newfstatat, "what is at a path"),
    always(libc::SYS_statx, "the same"),
    always(libc::SYS_fstatfs, "whether that is tmpfs"),
    always(libc::SYS_openat, "Landlock says which"),
    always(libc::SYS_readlinkat, "what a descriptor is called"),
    always(libc::SYS_unlinkat, "Landlock says which: sockets at the end"),
    always(libc::SYS_renameat2, "Landlock says which: files that replace others as a whole"),
    always(libc::SYS_renameat, "the same"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_readlink, "as readlinkat"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_unlink, "as unlinkat"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_rename, "as renameat"),
    always(libc::SYS_faccessat2, "whether an image can be written"),
    always(libc::SYS_faccessat, "the same, before Linux 5.8"),
    always(libc::SYS_getcwd, "what a relative path means"),
    always(libc::SYS_close, "descriptors"),
    when(libc::SYS_fcntl, Kind::One(1, CONTROLS), "locks, copies and flags of descriptors"),
    when(libc::SYS_mmap, Kind::Masked(2, EXECUTE, 0), "memory, none that can be executed"),
    when(libc::SYS_mprotect, Kind::Masked(2, EXECUTE, 0), "the same"),
    always(libc::SYS_munmap, "memory"),
    always(libc::SYS_mremap, "memory"),
    always(libc::SYS_madvise, "memory"),
    always(libc::SYS_brk, "memory"),
    when(
        libc::SYS_clone,
        Kind::Masked(0, THREAD | NAMESPACES, THREAD),
        "threads, no processes and no namespaces",
    ),
    when(libc::SYS_clone3, Kind::Quietly, "threads: refused, so that the library takes clone"),
    always(libc::SYS_set_robust_list, "a thread begins"),
    always(libc::SYS_rseq, "a thread begins"),
    always(libc::SYS_sigaltstack, "a thread begins and ends"),
    always(libc::SYS_futex, "threads wait for each other"),
    always(libc::SYS_sched_yield, "the same"),
    always(libc::SYS_sched_getaffinity, "how many processors there are"),
    always(libc::SYS_gettid, "which thread this is"),
    always(libc::SYS_getpid, "which process this is"),
    always(libc::SYS_geteuid, "whose process this is"),
    always(libc::SYS_getuid, "the same"),
    when(
        libc::SYS_prctl,
        Kind::One(0, &[libc::PR_SET_NAME as u64, libc::PR_GET_NAME as u64, PR_SET_VMA]),
        "the names of threads and of memory",
    ),
    when(
        libc::SYS_prlimit64,
        Kind::Both(Word(0, u64::MAX >> 32, 0), Word(2, u64::MAX >> 32, 0)),
        "the size of a stack: to look, at oneself",
    ),
    always(libc::SYS_exit, "a thread ends"),
    always(libc::SYS_exit_group, "the process ends"),
    when(libc::SYS_tgkill, Kind::Own(0), "abort: a signal to oneself"),
    when(libc::SYS_kill, Kind::Own(0), "a death at a named point, in builds for tests"),
    always(libc::SYS_rt_sigaction, "how signals are taken"),
    always(libc::SYS_rt_sigprocmask, "the same"),
    always(libc::SYS_rt_sigreturn, "the same"),
    always(libc::SYS_rt_sigtimedwait, "the end is asked for"),
    always(libc::SYS_restart_syscall, "a call was interrupted"),
    always(libc::SYS_clock_gettime, "the time, where the kernel does not show it in memory"),
    always(libc::SYS_clock_getres, "the same"),
    always(libc::SYS_gettimeofday, "the same"),
    always(libc::SYS_clock_nanosleep, "waits"),
    always(libc::SYS_nanosleep, "waits"),
    always(libc::SYS_ppoll, "waits"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_poll, "waits"),
    always(libc::SYS_getrandom, "keys of hash tables; ids"),
    always(libc::SYS_sysinfo, "how much memory there is, for sorting"),
];

/// Controls of devices and sockets.
const TIOCOUTQ: u64 = 0x5411;
const FIONREAD: u64 = 0x541b;
const FIONBIO: u64 = 0x5421;
const BLKGETSIZE64: u64 = 0x8008_1272;
const BLKSSZGET: u64 = 0x1268;
/// UFFDIO_API, REGISTER, UNREGISTER, and USERFAULTFD_IOC_NEW of the device.
const UFFDIO: [u64; 4] = [0xc018_aa3f, 0xc020_aa00, 0x8010_aa01, 0xaa00];

/// Of linux/vfio.h: VFIO_IOMMU_MAP_DMA, VFIO_IOMMU_UNMAP_DMA, VFIO_DEVICE_SET_IRQS, VFIO_DEVICE_RESET.
const VFIO: [u64; 4] = [0x3b71, 0x3b72, 0x3b6e, 0x3b6f];

/// `semper-blkd`.
pub(crate) const BLKD: &[Call] = &[
    always(
        libc::SYS_getdents64,
        "files of layers that nobody knows; Landlock says which directory",
    ),
    always(libc::SYS_io_uring_enter, "requests, in rings that were made and restricted before"),
    always(libc::SYS_preadv2, "reads that do not wait"),
    always(libc::SYS_pwritev2, "writes that do not wait, or that last"),
    always(libc::SYS_mincore, "what the page cache has"),
    always(libc::SYS_getrusage, "whether copies had to wait"),
    always(libc::SYS_setpriority, "work that nobody waits for"),
    always(libc::SYS_getpriority, "a thread goes back to where it was"),
    always(
        libc::SYS_sched_setattr,
        "short turns; a spare that serves goes back to where others are",
    ),
    always(libc::SYS_sched_setscheduler, "work that nobody waits for"),
    always(libc::SYS_sched_getscheduler, "whether a thread is before others"),
    always(libc::SYS_close_range, "a thread that has no file of the image's"),
    always(libc::SYS_memfd_create, "the in-flight region, the page of a session"),
    always(libc::SYS_eventfd2, "threads wake each other"),
    always(libc::SYS_epoll_create1, "threads wait for the driver"),
    always(libc::SYS_epoll_ctl, "the same"),
    always(libc::SYS_epoll_pwait, "the same"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_epoll_wait, "the same"),
    always(libc::SYS_pipe2, "answers that outlive the process"),
    always(libc::SYS_splice, "the same"),
    // No datagrams: they go to any socket without a connection. And none is connected.
    when(libc::SYS_socket, Kind::Both(FAMILY_UNIX, PACKETS), "the session's socket"),
    when(libc::SYS_socketpair, Kind::Both(FAMILY_UNIX, STREAM), "the parser of messages"),
    always(libc::SYS_bind, "the session's socket"),
    always(libc::SYS_listen, "the session's socket, the door"),
    always(libc::SYS_accept4, "front ends, spares, clients of the control socket"),
    always(libc::SYS_getsockname, "the path of the door"),
    always(libc::SYS_getsockopt, "who has connected"),
    always(libc::SYS_setsockopt, "limits on time"),
    always(libc::SYS_sendmsg, "messages with files"),
    always(libc::SYS_recvmsg, "messages with files"),
    always(libc::SYS_sendto, "messages"),
    always(libc::SYS_recvfrom, "messages"),
    always(libc::SYS_shutdown, "a front end is sent away"),
    when(
        libc::SYS_ioctl,
        Kind::One(
            1,
            &[
                TIOCOUTQ,
                FIONREAD,
                FIONBIO,
                BLKGETSIZE64,
                BLKSSZGET,
                UFFDIO[0],
                UFFDIO[1],
                UFFDIO[2],
                UFFDIO[3],
            ],
        ),
        "what is unread; sizes of devices; faults of memory that is still to come",
    ),
];

/// `semper-blkd --export`.
pub(crate) const EXPORT: &[Call] =
    &[always(libc::SYS_linkat, "the file gets its name, over no other; Landlock says where")];

/// `semper-wired`, which has its sockets before its walls, and others from the process beside.
pub(crate) const WIRED: &[Call] = &[
    always(libc::SYS_accept4, "the other end, QEMU, clients of the control socket"),
    always(libc::SYS_getsockname, "which port was free"),
    always(libc::SYS_getpeername, "who has connected"),
    always(libc::SYS_getsockopt, "whether it is connected"),
    always(libc::SYS_setsockopt, "limits on time"),
    always(libc::SYS_sendmsg, "the stream"),
    always(libc::SYS_recvmsg, "the stream"),
    always(libc::SYS_sendto, "the stream"),
    always(libc::SYS_recvfrom, "the stream"),
    always(libc::SYS_shutdown, "an end says that it is done"),
    always(libc::SYS_eventfd2, "threads wake each other"),
    always(libc::SYS_pipe2, "threads wake each other"),
    always(libc::SYS_setpriority, "work that nobody waits for"),
    when(libc::SYS_ioctl, Kind::One(1, &[TIOCOUTQ, FIONREAD, FIONBIO]), "what is unread"),
];

/// `semper-saved`.
pub(crate) const SAVED: &[Call] = &[
    // `narrow`: what was open for the disks, which the saved state names, is shut.
    always(libc::SYS_landlock_create_ruleset, "further walls"),
    always(libc::SYS_landlock_add_rule, "further walls"),
    always(libc::SYS_landlock_restrict_self, "further walls"),
    always(libc::SYS_capset, "fewer capabilities"),
    when(libc::SYS_prctl, Kind::One(0, &[libc::PR_SET_NO_NEW_PRIVS as u64]), "further walls"),
];

/// `semper-vfiod`.
pub(crate) const VFIOD: &[Call] = &[
    always(libc::SYS_io_uring_enter, "requests, in a ring that was made and restricted before"),
    always(libc::SYS_preadv2, "reads that do not wait"),
    always(libc::SYS_pwritev2, "writes that do not wait, or that last"),
    always(libc::SYS_mincore, "what the page cache has"),
    always(libc::SYS_getrusage, "whether copies had to wait"),
    always(libc::SYS_setpriority, "work that nobody waits for"),
    always(libc::SYS_getpriority, "a thread goes back to where it was"),
    always(libc::SYS_sched_setscheduler, "work that nobody waits for"),
    always(libc::SYS_sched_getscheduler, "whether a thread is before others"),
    always(libc::SYS_close_range, "a thread that has no file but the image's"),
    always(libc::SYS_memfd_create, "the page that a guest writes by itself"),
    always(libc::SYS_eventfd2, "threads wake each other"),
    always(libc::SYS_epoll_create1, "an engine's own sleep"),
    always(libc::SYS_epoll_ctl, "the same"),
    always(libc::SYS_pipe2, "answers that outlive the process"),
    always(libc::SYS_splice, "the same"),
    always(libc::SYS_getsockopt, "who has connected"),
    always(libc::SYS_accept4, "QEMU, spares, clients of the control socket"),
    always(libc::SYS_sendmsg, "messages with files"),
    always(libc::SYS_recvmsg, "messages with files"),
    always(libc::SYS_sendto, "answers of the control socket"),
    always(libc::SYS_recvfrom, "lines of the control socket"),
    always(libc::SYS_shutdown, "a client is sent away"),
    when(
        libc::SYS_ioctl,
        Kind::One(1, &[FIONREAD, FIONBIO, BLKGETSIZE64, BLKSSZGET]),
        "what is unsent; sizes of devices",
    ),
];

/// `semper-vfiod` with a real PCI device: no I/O of its own, and four requests of linux/vfio.h.
pub(crate) const VFIOD_PCI: &[Call] = &[
    always(libc::SYS_memfd_create, "the page where captured doorbells stand"),
    always(libc::SYS_eventfd2, "threads wake each other"),
    always(libc::SYS_accept4, "QEMU, clients of the control socket"),
    always(libc::SYS_sendmsg, "messages with files"),
    always(libc::SYS_recvmsg, "messages with files"),
    always(libc::SYS_sendto, "answers of the control socket"),
    always(libc::SYS_recvfrom, "lines of the control socket"),
    always(libc::SYS_shutdown, "a client is sent away"),
    when(
        libc::SYS_ioctl,
        Kind::One(1, &[FIONBIO, VFIO[0], VFIO[1], VFIO[2], VFIO[3]]),
        "the guest's memory, interrupts, reset",
    ),
];

/// The process that connects, and that is all that it does: not even [`ALL`].
pub(crate) const CONNECTS: &[Call] = &[
    always(libc::SYS_recvfrom, "what is asked for"),
    always(libc::SYS_sendmsg, "the connection is handed over"),
    always(libc::SYS_write, "the log"),
    when(libc::SYS_socket, Kind::Both(FAMILY_UNIX, STREAM), "QEMU, backends, plugs of the door"),
    when(libc::SYS_socket, Kind::Both(FAMILY_UNIX, PACKETS), "a spare to a session"),
    when(
        libc::SYS_socket,
        Kind::Both(Word(0, u64::MAX >> 32, libc::AF_INET as u64), STREAM),
        "the other end; Landlock says which port",
    ),
    when(
        libc::SYS_socket,
        Kind::Both(Word(0, u64::MAX >> 32, libc::AF_INET6 as u64), STREAM),
        "the other end; Landlock says which port",
    ),
    always(libc::SYS_bind, "the name of a plug"),
    always(libc::SYS_connect, "what was named on the command line"),
    always(libc::SYS_getsockopt, "whether it is connected"),
    when(libc::SYS_ioctl, Kind::One(1, &[FIONBIO]), "waits no longer than is said"),
    always(libc::SYS_ppoll, "the same"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_poll, "the same"),
    always(libc::SYS_close, "descriptors"),
    when(
        libc::SYS_fcntl,
        Kind::One(1, &[libc::F_GETFD as u64]),
        "whether a descriptor is open, in builds for tests",
    ),
    when(libc::SYS_mmap, Kind::Masked(2, EXECUTE, 0), "memory, none that can be executed"),
    always(libc::SYS_munmap, "memory"),
    always(libc::SYS_mremap, "memory"),
    always(libc::SYS_madvise, "memory"),
    always(libc::SYS_brk, "memory"),
    always(libc::SYS_futex, "the lock of the log"),
    always(libc::SYS_getpid, "the name of a plug"),
    always(libc::SYS_clock_gettime, "the time, where the kernel does not show it in memory"),
    always(libc::SYS_rt_sigreturn, "a system call was refused"),
    always(libc::SYS_restart_syscall, "a call was interrupted"),
    always(libc::SYS_exit_group, "the end"),
];

#[cfg(test)]
mod tests {
    use super::*;

    const TABLES: [&[&[Call]]; 6] =
        [&[ALL, BLKD], &[ALL, WIRED], &[ALL, SAVED], &[ALL, VFIOD], &[ALL, VFIOD_PCI], &[CONNECTS]];

    fn allows(tables: &[&[Call]], number: libc::c_long) -> bool {
        tables.iter().any(|table| table.iter().any(|call| call.number == number))
    }

    #[test]
    fn each_call_has_a_reason_and_what_must_not_be_there_is_not() {
        for tables in TABLES {
            assert!(tables.iter().all(|table| table.iter().all(|call| !call.why.is_empty())));
            for refused in [
                libc::SYS_execve,
                libc::SYS_execveat,
                libc::SYS_ptrace,
                libc::SYS_process_vm_writev,
                libc::SYS_process_vm_readv,
                libc::SYS_pidfd_getfd,
                libc::SYS_pidfd_send_signal,
                libc::SYS_init_module,
                libc::SYS_finit_module,
                libc::SYS_kexec_load,
                libc::SYS_kexec_file_load,
                libc::SYS_bpf,
                libc::SYS_userfaultfd,
                libc::SYS_io_uring_setup,
                libc::SYS_io_uring_register,
                libc::SYS_mount,
                libc::SYS_umount2,
                libc::SYS_pivot_root,
                libc::SYS_chroot,
                libc::SYS_unshare,
                libc::SYS_setns,
                libc::SYS_perf_event_open,
                libc::SYS_keyctl,
                libc::SYS_setuid,
                libc::SYS_linkat,
                libc::SYS_mknodat,
                libc::SYS_open_by_handle_at,
                libc::SYS_fchmodat,
                libc::SYS_fchownat,
                libc::SYS_reboot,
            ] {
                assert!(!allows(tables, refused), "{refused}");
            }
        }
        // Only who does nothing else may connect, and opens nothing.
        let all = || TABLES.into_iter();
        let connect = |tables: &&[&[Call]]| allows(tables, libc::SYS_connect);
        assert_eq!(all().filter(connect).count(), 1);
        assert!(allows(&[CONNECTS], libc::SYS_connect));
        for refused in [libc::SYS_openat, libc::SYS_clone, libc::SYS_accept4, libc::SYS_recvmsg] {
            assert!(!allows(&[CONNECTS], refused), "{refused}");
        }
        // The control: the look at the tables finds what is there.
        assert!(allows(&[ALL], libc::SYS_read));
        assert!(allows(&[EXPORT], libc::SYS_linkat) && EXPORT.len() == 1);
    }

    #[test]
    fn a_call_that_is_listed_twice_says_when_both_times() {
        // An entry without conditions would be lost among those that have some.
        for tables in TABLES {
            let calls: Vec<_> = tables.iter().flat_map(|table| table.iter()).collect();
            for call in &calls {
                let same = calls.iter().filter(|other| other.number == call.number).count();
                let bare = matches!(call.kind, Kind::Always | Kind::Quietly);
                assert!(same == 1 || !bare, "{call:?}");
            }
        }
    }
}
