//! An NVMe controller (NVM Express 1.4) whose namespace is a raw image, and whose whole state can be
//! moved to another process while commands are in flight.
//!
//! | module | what it is |
//! |---|---|
//! | [`spec`] | numbers of the specification: registers, commands, status codes |
//! | [`command`] | a submission entry, and what is answered |
//! | [`data`] | where a command's data is: PRP lists and SGLs, into ranges of guest memory |
//! | [`queue`] | submission and completion queues |
//! | [`identify`] | what the controller tells of itself; log pages |
//! | [`features`] | what a driver can set |
//! | [`journal`] | what the next process has to know of commands |
//! | [`storage`] | requests of the namespace on an engine of `semper-block` |
//! | [`admin`] | commands about the controller |
//! | [`controller`] | registers, doorbells, and one step of all |
//! | [`state`] | what is saved and restored |
//!
//! The controller is a [`semper_device::Device`]: it reaches the guest by the bus alone, never panics,
//! and never waits. Doorbells are found in the direct page, whoever put them there: shared doorbells
//! are levels, so a driver that rings twice between two looks has rung once, with the newer value.

pub mod admin;
pub mod command;
pub mod controller;
pub mod data;
pub mod features;
pub mod identify;
pub mod journal;
pub mod queue;
pub mod spec;
pub mod state;
pub mod storage;

#[cfg(test)]
mod deaths;
#[cfg(test)]
mod tests;

pub use controller::{Controller, Settings};
pub use storage::{Storage, Store};
