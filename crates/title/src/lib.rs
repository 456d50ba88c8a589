//! By what right this process writes its image: its claim, held against the image's own record.
//!
//! ```text
//!   none                                no options: only an image that nobody has claimed
//!   awaited ──"claim"──► given ──admit──► admitted ──the image is given away──► given
//!                          ▲ --epoch, --claim
//! ```
//!
//! The record is looked at whenever the image's lock was taken, and at no other time: while the
//! lock is held, nobody else writes. `docs/design/ownership.md` has the rules, point by point.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use semper_block::Image;
use semper_epoch::{
    Claim, Denied, Holder, Record, admit_confirmed, check_unclaimed, confirm, release,
};
use serde::Serialize;

/// What the control socket tells of a claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Status {
    /// "none", "awaited", "given" or "admitted".
    pub state: &'static str,
    /// Of the claim, if there is one.
    pub epoch: Option<u64>,
    /// The same: 32 hexadecimal digits.
    pub id: Option<String>,
    /// Whose claim it is.
    pub holder: Option<String>,
}

/// The claim of this process, if it has one.
pub struct Title {
    record: Option<(PathBuf, Holder)>,
    state: Mutex<State>,
    /// What is on the medium for sure.
    confirmed: Mutex<Option<Record>>,
}

#[derive(Clone, Copy, Default)]
struct State {
    claim: Option<Claim>,
    /// It stands in the record, and the image is locked.
    admitted: bool,
}

impl Title {
    /// `record`: the image's record of claims, and whose the claim is; without it the image must be
    /// claimed by nobody. `claim`: which; one that is not there yet is awaited.
    pub fn new(record: Option<(PathBuf, Holder)>, claim: Option<Claim>) -> Self {
        let state = Mutex::new(State { claim, admitted: false });
        Self { record, state, confirmed: Mutex::default() }
    }

    /// That of a process without options.
    pub fn none() -> Self {
        Self { record: None, state: Mutex::default(), confirmed: Mutex::default() }
    }

    /// Flushes the record if it has the claim already, so that a spare need not when a guest waits.
    pub fn confirm(&self) {
        let (Some((path, _)), Some(claim)) = (&self.record, self.state().claim) else { return };
        match confirm(path, claim) {
            Ok(record) => {
                *self.confirmed.lock().unwrap_or_else(PoisonError::into_inner) = record;
            }
            // It is looked at again, and flushed, when the image is taken.
            Err(error) => log::warn!("the claim is not confirmed yet error=\"{error}\""),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The claim, if there is one.
    pub fn claim(&self) -> Option<Claim> {
        self.state().claim
    }

    /// Whether the claim is still to come. The image must not be locked before.
    pub fn is_awaited(&self) -> bool {
        self.record.is_some() && self.state().claim.is_none()
    }

    /// Takes the claim that was awaited; the same one again is no error.
    ///
    /// # Errors
    /// A sentence, when this process has another, or none to wait for.
    pub fn give(&self, claim: Claim) -> Result<(), String> {
        let mut state = self.state();
        match state.claim {
            _ if self.record.is_none() => {
                Err("this process awaits no claim; start one with --await-claim".to_owned())
            }
            Some(mine) if mine != claim => Err(format!(
                "this process has the claim {} of epoch {}; another claim is another process",
                mine.id, mine.epoch
            )),
            _ => {
                state.claim = Some(claim);
                Ok(())
            }
        }
    }

    /// Holds the claim against the record. To be called with the image locked, before anything is
    /// served.
    ///
    /// # Errors
    /// [`Denied`]: this process must not serve.
    pub fn admit(&self, image: &Image) -> Result<(), Denied> {
        if image.read_only() {
            return Ok(());
        }
        let Some((path, holder)) = &self.record else {
            // Its name may lead to another image by now, and so to another's record.
            return check_unclaimed(Path::new(&format!("/proc/self/fd/{}", image.fd())));
        };
        // Not locked meanwhile: the status is asked for at any time.
        let claim = self.state().claim.expect("no image is locked while its claim is awaited");
        let confirmed = self.confirmed.lock().unwrap_or_else(PoisonError::into_inner).take();
        let said = admit_confirmed(path, claim, holder, confirmed.as_ref())?;
        self.state().admitted = true;
        let (epoch, path) = (claim.epoch, path.display());
        log::info!("the claim is admitted epoch={epoch} holder={holder} said={said:?} file={path}");
        Ok(())
    }

    /// The image's lock was let go: before it is taken again the record counts again.
    pub fn lapse(&self) {
        self.state().admitted = false;
    }

    /// Notes an orderly end in the record. To be called with the image still locked.
    pub fn release(&self) {
        let State { claim, admitted } = *self.state();
        let (Some((path, _)), Some(claim), true) = (&self.record, claim, admitted) else { return };
        match release(path, claim) {
            Ok(true) => {}
            Ok(false) => log::warn!("the image has another holder file={}", path.display()),
            // As if this process had been killed: the same claim will do, and no other.
            Err(error) => log::error!("not released error=\"{error}\""),
        }
    }

    /// What is to be told of it.
    pub fn status(&self) -> Status {
        let State { claim, admitted } = *self.state();
        let state = match (&self.record, claim, admitted) {
            (None, ..) => "none",
            (_, None, _) => "awaited",
            (_, _, false) => "given",
            (_, _, true) => "admitted",
        };
        Status {
            state,
            epoch: claim.map(|claim| claim.epoch),
            id: claim.map(|claim| claim.id.to_string()),
            holder: self.record.as_ref().map(|(_, holder)| holder.to_string()),
        }
    }
}
