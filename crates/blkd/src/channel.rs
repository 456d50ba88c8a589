//! The channel on which the device speaks first (protocol feature BACKEND_REQ): a socket that the
//! front end hands over. One message goes over it here: that the configuration space has changed.
//! No answer to it is asked for, and so none is waited for.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::{BackendReq, FrontendReq};

use crate::message::{Message, send};

/// The device's end.
#[derive(Debug)]
pub(crate) struct Channel(Arc<OwnedFd>);

impl Channel {
    /// What this message of the front end hands over, if that is the channel. (The crate `vhost`
    /// gives it a form that can send no such message as ours.)
    pub(crate) fn of(message: &Message) -> Option<Self> {
        let hands_over = message.request() == FrontendReq::SET_BACKEND_REQ_FD as u32;
        message.files.first().filter(|_| hands_over).cloned().map(Self)
    }

    /// Tells the front end to read the configuration space again. Never waits.
    ///
    /// # Errors
    /// The system's: the front end does not read, or is gone.
    pub(crate) fn tell_config_changed(&self) -> io::Result<()> {
        send(&*self.0, &Message::new(BackendReq::CONFIG_CHANGE_MSG as u32, &[]), false)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn message(request: FrontendReq, files: Vec<OwnedFd>) -> Message {
        let files = files.into_iter().map(Arc::new).collect();
        Message::with_files(request as u32, &[], files)
    }

    #[test]
    fn what_is_handed_over_is_told_that_the_configuration_changed() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        let channel = message(FrontendReq::SET_BACKEND_REQ_FD, vec![ours.into()]);
        Channel::of(&channel).unwrap().tell_config_changed().unwrap();
        let mut told = [0; 12];
        theirs.read_exact(&mut told).unwrap();
        // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, no answer wanted, no body.
        assert_eq!(told.to_vec(), [2u32, 1, 0].map(u32::to_ne_bytes).concat());
    }

    #[test]
    fn other_messages_hand_over_none() {
        let (one, _other) = UnixStream::pair().unwrap();
        let other = message(FrontendReq::SET_LOG_FD, vec![one.into()]);
        assert!(Channel::of(&other).is_none());
        assert!(Channel::of(&message(FrontendReq::SET_BACKEND_REQ_FD, Vec::new())).is_none());
    }

    #[test]
    fn a_front_end_that_does_not_read_is_not_waited_for() {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let channel = Channel(Arc::new(ours.into()));
        let failed = (0..1 << 20).find_map(|_| channel.tell_config_changed().err());
        assert_eq!(failed.unwrap().kind(), io::ErrorKind::WouldBlock);
        drop(theirs);
        assert!(channel.tell_config_changed().is_err());
    }
}
