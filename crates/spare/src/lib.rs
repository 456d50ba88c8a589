//! What a process that serves shares with its spare, whatever they serve: the socket by which the
//! spare follows, and the answers that are on their way when it dies. What is told over the socket is
//! each program's own.

pub mod outbox;
pub mod socket;
