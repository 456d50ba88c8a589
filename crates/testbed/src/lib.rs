//! What the tests of several crates stand on. Nothing here is part of a program.
//!
//! * [`DriverRing`] is the driver's end of a split virtqueue, in raw memory: what a guest's kernel
//!   does, and what a hostile one could do.
//! * [`Guest`] submits a list of [`Request`]s through such a ring and holds the device to its word.
//! * [`History`] judges what the guest saw: is there a legal order that explains it?
//! * [`Choices`] walks through all paths of a test that has to make decisions.

mod choices;
mod driver;
mod guest;
mod history;

pub use choices::Choices;
pub use driver::{Buffer, DriverRing, Layout};
pub use guest::{Format, Guest, Misbehaviour, Wakeup};
pub use history::{History, Request, Verb};
