//! A run: many lanes that write stamped blocks to one device and read them back.
//!
//! ```text
//!   start ──► running ──request_stop──► stopping ──every lane came back──► quiet ──resume──► running
//!                                          └──deadline──► quiet, the lanes still out are hung
//! ```
//!
//! A *lane* is one thread with one request at a time; a writer of depth n is n lanes. Lane i of n owns
//! the blocks i, i + n, i + 2n, …, so that no two requests in flight ever overlap and neighbouring
//! blocks belong to different lanes. In mode `overlap` every lane writes stretches of blocks anywhere.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::clock::now_ns;
use crate::config::Config;
use crate::device::Device;
use crate::lane;
use crate::ledger::Ledger;
use crate::protocol::Failure;
use crate::shared::Shared;
use crate::stamp::Identity;
use crate::wakeup::Wakeup;

/// A run, as its owner holds it.
pub struct Run {
    /// What the lanes see.
    pub shared: Arc<Shared>,
}

impl Run {
    /// Starts the lanes of a new run. `ledger` is that of an earlier run with the same geometry.
    pub fn start(
        config: Config,
        device: Device,
        nonce: u128,
        ledger: Arc<Ledger>,
        wakeup: Wakeup,
    ) -> Result<Self, Failure> {
        let identity = Identity { nonce, device: device.id() };
        ledger.forget_reports();
        let run = Self { shared: Arc::new(Shared::new(config, device, identity, ledger, wakeup)) };
        run.resume()?;
        Ok(run)
    }

    /// Starts the lanes again on the same counters.
    pub fn resume(&self) -> Result<(), Failure> {
        if !self.is_quiet() {
            return Err(Failure::unavailable(format!(
                "{} lanes of the last run on {} did not come back",
                self.shared.active.load(Ordering::Acquire),
                self.shared.device.name
            )));
        }
        self.shared.stop.store(false, Ordering::Release);
        self.shared.overdue.store(false, Ordering::Release);
        self.shared.gaps.start(now_ns());
        for index in 0..self.shared.config.lanes() {
            let state = self.shared.enlist();
            if let Err(error) = lane::spawn(Arc::clone(&self.shared), state, index) {
                self.shared.active.fetch_sub(1, Ordering::AcqRel);
                self.request_stop();
                return Err(Failure::failed(format!("cannot start lane {index}: {error}")));
            }
        }
        Ok(())
    }

    /// Lanes end after the request that they have in flight.
    pub fn request_stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
    }

    /// Whether the lanes were told to run.
    pub fn is_running(&self) -> bool {
        !self.shared.stop.load(Ordering::Acquire)
    }

    /// Whether every lane came back.
    pub fn is_quiet(&self) -> bool {
        self.shared.active.load(Ordering::Acquire) == 0
    }
}
