//! One vhost-user message on its way through the relay.
//!
//! ```text
//!  0         4       8       12
//!  | request | flags | size  | payload: `size` bytes |   native endian; file descriptors beside it
//! ```

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// Requests that the relay has to know (vhost-user.rst, "Front-end message types").
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const GET_CONFIG: u32 = 24;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
}

const HEADER: usize = 12;
const VERSION: u32 = 1;
const FLAG_NEED_REPLY: u32 = 1 << 3;
/// No message of the protocol comes near it.
const MAX_PAYLOAD: usize = 1 << 16;
const MAX_FDS: usize = 8;

/// A message with the descriptors that travel beside it.
#[derive(Debug)]
pub struct Message {
    /// What is asked or answered.
    pub request: u32,
    flags: u32,
    /// The bytes after the header.
    pub payload: Vec<u8>,
    /// The descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// A request that asks for an answer.
    pub fn new(request: u32, payload: Vec<u8>, fds: Vec<OwnedFd>) -> Self {
        Self { request, flags: VERSION | FLAG_NEED_REPLY, payload, fds }
    }

    /// Whether the other end answers this request.
    pub fn expects_reply(&self) -> bool {
        use request::*;
        self.flags & FLAG_NEED_REPLY != 0
            || matches!(
                self.request,
                GET_FEATURES
                    | GET_VRING_BASE
                    | GET_PROTOCOL_FEATURES
                    | GET_QUEUE_NUM
                    | GET_CONFIG
                    | GET_INFLIGHT_FD
                    | GET_MAX_MEM_SLOTS
            )
    }

    /// The payload's 64-bit word `index`, 0 where the payload is shorter.
    pub fn word(&self, index: usize) -> u64 {
        self.payload
            .get(index * 8..index * 8 + 8)
            .map_or(0, |bytes| u64::from_ne_bytes(bytes.try_into().expect("eight bytes")))
    }

    /// The payload's 32-bit word `index`, 0 where the payload is shorter.
    pub fn half(&self, index: usize) -> u32 {
        self.payload
            .get(index * 4..index * 4 + 4)
            .map_or(0, |bytes| u32::from_ne_bytes(bytes.try_into().expect("four bytes")))
    }

    /// Waits for one message. `None` if the other end closed the connection between messages.
    pub fn receive(mut stream: &UnixStream) -> io::Result<Option<Self>> {
        let mut header = [0u8; HEADER];
        let mut fds = Vec::new();
        let mut filled = 0;
        while filled < HEADER {
            let got = receive_some(stream, &mut header[filled..], &mut fds)?;
            if got == 0 {
                let cut = io::Error::from(io::ErrorKind::UnexpectedEof);
                return if filled == 0 { Ok(None) } else { Err(cut) };
            }
            filled += got;
        }
        let field =
            |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let size = field(8) as usize;
        if size > MAX_PAYLOAD {
            return Err(io::Error::other(format!("vhost-user message of {size} bytes")));
        }
        let mut payload = vec![0; size];
        stream.read_exact(&mut payload)?;
        Ok(Some(Self { request: field(0), flags: field(4), payload, fds }))
    }

    /// Sends the message; the descriptors stay open here.
    pub fn send(&self, mut stream: &UnixStream) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEADER + self.payload.len());
        for field in [self.request, self.flags, self.payload.len() as u32] {
            bytes.extend_from_slice(&field.to_ne_bytes());
        }
        bytes.extend_from_slice(&self.payload);
        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("too many file descriptors in one message"));
        }
        let sent = sendmsg(stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
        stream.write_all(&bytes[sent..])
    }
}

fn receive_some(stream: &UnixStream, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(stream, &mut [IoSliceMut::new(into)], &mut control, flags)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    Ok(got.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    #[test]
    fn a_message_arrives_whole_with_its_descriptors() {
        let (left, right) = UnixStream::pair().unwrap();
        let fd = eventfd(3, EventfdFlags::CLOEXEC).unwrap();
        let payload = [7u64.to_ne_bytes(), 9u64.to_ne_bytes()].concat();
        Message::new(request::ADD_MEM_REG, payload, vec![fd]).send(&left).unwrap();
        let message = Message::receive(&right).unwrap().unwrap();
        assert_eq!((message.request, message.word(0), message.word(1)), (37, 7, 9));
        assert_eq!((message.word(2), message.half(2), message.fds.len()), (0, 9, 1));
        assert!(message.expects_reply());
        drop(left);
        assert!(Message::receive(&right).unwrap().is_none());
    }

    #[test]
    fn a_cut_message_is_an_error() {
        let (mut left, right) = UnixStream::pair().unwrap();
        left.write_all(&[1, 0, 0, 0, 1]).unwrap();
        drop(left);
        assert!(Message::receive(&right).is_err());
    }

    #[test]
    fn an_endless_message_is_refused() {
        let (mut left, right) = UnixStream::pair().unwrap();
        left.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]).unwrap();
        assert!(Message::receive(&right).is_err());
    }
}
