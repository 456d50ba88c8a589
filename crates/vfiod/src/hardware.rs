//! Taking a real PCI device over, from descriptors that our parent has opened.

use std::fs::File;
use std::os::fd::FromRawFd;

use semper_device::Device;
use semper_vfio::profile::Plain;
use semper_vfio::{Function, Nvme};

use crate::args::{Args, Profile};
use crate::failure::Failure;

/// Opens it. Before the walls: later there is no way to do so.
pub(crate) fn open(args: &Args) -> Result<Box<dyn Device>, Failure> {
    let named = args.pci.as_deref().zip(args.vfio_group_fd).zip(args.vfio_container_fd);
    let Some(((address, group), container)) = named else {
        let cause = "no device was given; name one with --pci=ADDRESS, --vfio-group-fd=N and \
                     --vfio-container-fd=N";
        return Err(Failure::Usage(cause.to_owned()));
    };
    lock_as_much_as_needed();
    let (container, group) = (inherited(container)?, inherited(group)?);
    let incoming = args.incoming;
    Ok(match args.profile {
        Profile::Nvme => {
            Box::new(Nvme::open(container, group, address, incoming).map_err(Failure::Hardware)?)
        }
        Profile::Plain => {
            let opened = Function::open(container, group, address, None);
            Box::new(Plain::new(opened.map_err(Failure::Hardware)?))
        }
    })
}

/// A device may write to its guest's memory at any time, so all of it is locked; without capabilities the
/// limit counts. Where it cannot be raised, the map says so that does not fit.
fn lock_as_much_as_needed() {
    let all = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the limit is plain data that lives across the call.
    if unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &all) } == 0 {
        return;
    }
    let mut limit = all;
    // SAFETY: as above.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit);
        }
    }
}

fn inherited(fd: i32) -> Result<File, Failure> {
    // SAFETY: no memory is passed; on anything but an open descriptor it fails.
    if fd < 3 || unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(Failure::Usage(format!("file descriptor {fd} was not handed over")));
    }
    // SAFETY: the descriptor is open (fcntl worked), was given to us by our parent for this, and nothing
    // else in the process uses it.
    Ok(unsafe { File::from_raw_fd(fd) })
}
