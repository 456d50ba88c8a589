//! Rings of io_uring, made before a program gives up making any.
//!
//! Whoever may make a ring may have the kernel do most of what there are system calls for, past any
//! filter of system calls. So the rings of a program that has such a filter are made before it, and
//! each is restricted (IORING_REGISTER_RESTRICTIONS, Linux 5.10) to the operations that an engine uses,
//! before it is switched on.

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode};

pub(crate) const ENTRIES: u32 = 256;
const OPERATIONS: [u8; 8] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::PollRemove::CODE,
];

/// How long an engine may take to end whose thread has nothing to do any more.
const COMING_BACK: Duration = Duration::from_secs(5);

/// Rings that are ready, for engines that come and go.
#[derive(Clone)]
pub struct Rings(Arc<Shelf>);

#[derive(Default)]
struct Shelf {
    rings: Mutex<Vec<IoUring>>,
    back: Condvar,
    /// There are none at all.
    empty: bool,
}

impl Rings {
    /// So many of them. An engine that finds none waits a moment for one that ends, and is then
    /// refused ([`io::ErrorKind::QuotaExceeded`]).
    ///
    /// # Errors
    /// The kernel's: io_uring may be switched off.
    pub fn prepare(count: usize) -> io::Result<Self> {
        let rings = (0..count).map(|_| make()).collect::<io::Result<_>>()?;
        Ok(Self(Arc::new(Shelf { rings: Mutex::new(rings), ..Shelf::default() })))
    }

    /// None at all.
    pub fn none() -> Self {
        Self(Arc::new(Shelf { empty: true, ..Shelf::default() }))
    }

    pub(crate) fn lend(&self) -> io::Result<Ring> {
        let limit = if self.0.empty { Duration::ZERO } else { COMING_BACK };
        let rings = self.0.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.0.back.wait_timeout_while(rings, limit, |rings| rings.is_empty());
        let mut ring = waited.unwrap_or_else(PoisonError::into_inner).0.pop().ok_or_else(|| {
            io::Error::new(io::ErrorKind::QuotaExceeded, "no ring of io_uring is left")
        })?;
        // The last word of wakers whose thread has ended.
        ring.completion().for_each(drop);
        Ok(Ring { ring: Some(ring), home: self.clone() })
    }
}

/// A ring on loan: another engine may have it afterwards. None is in flight at its end.
pub(crate) struct Ring {
    ring: Option<IoUring>,
    home: Rings,
}

impl Drop for Ring {
    fn drop(&mut self) {
        let shelf = &self.home.0;
        shelf.rings.lock().unwrap_or_else(PoisonError::into_inner).extend(self.ring.take());
        shelf.back.notify_one();
    }
}

impl Deref for Ring {
    type Target = IoUring;

    fn deref(&self) -> &IoUring {
        self.ring.as_ref().expect("it is there until the end")
    }
}

impl DerefMut for Ring {
    fn deref_mut(&mut self) -> &mut IoUring {
        self.ring.as_mut().expect("it is there until the end")
    }
}

fn make() -> io::Result<IoUring> {
    let ring = IoUring::builder()
        .setup_r_disabled()
        .setup_coop_taskrun()
        .setup_cqsize(4 * ENTRIES)
        .build(ENTRIES)
        // Kernels before 5.19 do not know all of these.
        .or_else(|_| {
            IoUring::builder().setup_r_disabled().setup_cqsize(4 * ENTRIES).build(ENTRIES)
        })?;
    let mut restrictions = OPERATIONS.map(Restriction::sqe_op);
    ring.submitter().register_restrictions(&mut restrictions)?;
    ring.submitter().register_enable_rings()?;
    Ok(ring)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of opening a file by this ring.
    fn open_by(ring: &mut IoUring) -> i32 {
        let path = c"/etc/hostname";
        let at = io_uring::types::Fd(libc::AT_FDCWD);
        let entry = opcode::OpenAt::new(at, path.as_ptr()).build();
        // SAFETY: the path is a constant.
        unsafe { ring.submission().push(&entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        ring.completion().next().unwrap().result()
    }

    #[test]
    fn a_ring_does_what_engines_do_and_nothing_else() {
        let Ok(rings) = Rings::prepare(1) else { return };
        let mut ring = rings.lend().unwrap();
        assert_eq!(open_by(&mut ring), -libc::EACCES);
        assert!(open_by(&mut IoUring::new(8).unwrap()) >= 0, "the control opens it");
    }

    #[test]
    fn rings_come_back() {
        let Ok(rings) = Rings::prepare(1) else { return };
        let ring = rings.lend().unwrap();
        let next = std::thread::spawn(move || rings.lend().is_ok());
        drop(ring);
        assert!(next.join().unwrap());
        assert!(Rings::none().lend().is_err());
    }
}
