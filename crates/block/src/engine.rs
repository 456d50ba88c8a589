//! The contract between a queue's thread and what does its I/O.

use std::io;
use std::os::fd::RawFd;
#[cfg(target_arch = "x86_64")]
use std::sync::Arc;

use crate::io::Io;
#[cfg(target_arch = "x86_64")]
use crate::mapped::Mapping;

/// What became of a request that was given to an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Submission {
    /// Done at once, with the system call's result: bytes moved, or a negative errno.
    Done(i32),
    /// Under way; [`Engine::reap`] will give its token and result.
    Queued,
}

/// Does block I/O for one thread.
///
/// Contract, for every engine and decorator:
/// * it never panics on a request, and never blocks except in [`Engine::wait`] and, for a
///   synchronous engine, in [`Engine::submit`];
/// * every token that was queued is given back exactly once, in any order;
/// * tokens are below 2^48: a decorator that does a request in parts tells these by what is above;
/// * a result may be short; [`Io::absorb`] decides whether to submit the rest;
/// * bounds were checked by the caller; an engine may still answer with any errno.
pub trait Engine {
    /// Whether requests can overtake each other, so that the caller must hold back those that
    /// overlap.
    const CONCURRENT: bool;

    /// Starts `io`.
    ///
    /// # Safety
    /// `io`, and the memory that its segments name, must stay where they are and mapped until the
    /// token was reaped (or the submission was `Done`).
    unsafe fn submit(&mut self, token: u64, io: &Io) -> Submission;

    /// Hands everything queued to the kernel without waiting, and lets completions arrive.
    ///
    /// # Errors
    /// The kernel's, when it can take no more requests at all.
    fn flush(&mut self) -> io::Result<()>;

    /// Appends (token, result) of every request that ended.
    fn reap(&mut self, into: &mut Vec<(u64, i32)>);

    /// Requests queued and not reaped.
    fn in_flight(&self) -> usize;

    /// Wakes [`Engine::wait`] at each write to the eventfd from now on. The counter is never
    /// read, which saves a system call for each kick.
    ///
    /// # Errors
    /// The kernel's.
    fn add_waker(&mut self, fd: RawFd) -> io::Result<()>;

    /// Undoes [`Engine::add_waker`]; call it before the descriptor is closed.
    fn remove_waker(&mut self, fd: RawFd);

    /// Sleeps until a waker was written to or a request ended.
    ///
    /// # Errors
    /// The kernel's; an interrupted sleep is not an error.
    fn wait(&mut self) -> io::Result<()>;
}

/// A file beside the image, as engines reach it. Whoever has it keeps the descriptors open.
#[derive(Clone)]
pub struct Target {
    /// What is read and written.
    pub fd: RawFd,
    /// The same file, opened once more without a lock, for flushes.
    pub flushed: RawFd,
    /// What the mapped engine copies from.
    #[cfg(target_arch = "x86_64")]
    pub mapping: Option<Arc<Mapping>>,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("fd", &self.fd).finish_non_exhaustive()
    }
}

/// An engine that reaches other files than the image it was made for. The contract is [`Engine`]'s.
pub trait FileEngine: Engine {
    /// Starts `io` on another file.
    ///
    /// # Safety
    /// As [`Engine::submit`], and the descriptors of `target` stay open as long; until the next
    /// [`Engine::flush`] at least.
    unsafe fn submit_to(&mut self, target: &Target, token: u64, io: &Io) -> Submission;
}
