//! semper-probe: what runs inside a guest while its disk is tormented from outside.
//!
//! As PID 1 of the test guest (`init`) it takes commands over a virtio-serial port; on a host the same
//! commands work over a unix socket (`serve`), or one run is made from the command line (`write`).
//! The [`judge`] judges by the [`stamp`]; [`lane`], [`ledger`] and [`writers`] feed it, and [`verify`]
//! has the last word.

pub mod base64;
pub mod binding;
pub mod buffer;
pub mod clock;
pub mod commands;
pub mod config;
pub mod control;
pub mod device;
pub mod heartbeat;
pub mod history;
pub mod init;
pub mod jobs;
pub mod judge;
pub mod kmsg;
pub mod lane;
pub mod ledger;
pub mod link;
pub mod modules;
pub mod net;
pub mod program;
pub mod protocol;
pub mod runs;
pub mod shared;
pub mod single;
pub mod stamp;
pub mod subject;
pub mod timeline;
pub mod verify;
pub mod wakeup;
pub mod writers;
