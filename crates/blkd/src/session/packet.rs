//! What the process that serves tells its spares, packet by packet.
//!
//! ```text
//!   0        4         6      8         16      20        24 + 8 n
//!   "SMSP"   version   kind   sequence  n       0         lengths and files of n parts │ the parts
//!   u32      u16       u16    u64       u32     u32       u32, u32 each                 │ bytes
//! ```
//!
//! Little-endian. The files of all parts come with the packet, in the order of the parts. Parts are
//! messages of vhost-user ([`Message`]).
//!
//! | kind | parts | files | meaning |
//! |---|---|---|---|
//! | begin | 1, empty | the progress page, the outbox's two ends | forget everything; what follows holds from `sequence` on |
//! | connected | 1, empty | the connection | a front end is there, and has said nothing |
//! | disconnected | – | – | it is gone |
//! | said | any number | theirs | messages of the transcript |
//! | last | request, answer | theirs | the last exchange, which the transcript has already |
//! | complete | – | – | that was all that there was before |
//! | exchange | request, answer | theirs | a message was understood, and will be answered |

use std::io;
use std::os::fd::AsFd;

use rustix::net::RecvFlags;

use crate::message::{self, Files, MAX_FILES, Message};

const MAGIC: u32 = u32::from_le_bytes(*b"SMSP");
/// Changes whenever an older process could misunderstand a packet.
pub(crate) const VERSION: u16 = 1;
const HEADER: usize = 24;
const PART: usize = 8;
/// Longest packet.
const MAX_BYTES: usize = 32 << 10;
/// Most bytes of messages in a packet of several: the longest message fits behind them.
const FULL: usize = 16 << 10;
const MAX_PARTS: usize = 512;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Kind {
    Begin = 1,
    Connected = 2,
    Disconnected = 3,
    Said = 4,
    Last = 5,
    Complete = 6,
    Exchange = 7,
}

impl Kind {
    const ALL: [Self; 7] = [
        Kind::Begin,
        Kind::Connected,
        Kind::Disconnected,
        Kind::Said,
        Kind::Last,
        Kind::Complete,
        Kind::Exchange,
    ];
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    pub kind: Kind,
    pub sequence: u64,
    pub parts: Vec<Message>,
}

impl Packet {
    pub(crate) fn new(kind: Kind, sequence: u64, parts: Vec<Message>) -> Self {
        Self { kind, sequence, parts }
    }

    /// One with files and no message.
    pub(crate) fn with_files(kind: Kind, sequence: u64, files: Files) -> Self {
        Self::new(kind, sequence, vec![Message { bytes: Vec::new(), files }])
    }

    fn encode(&self) -> Message {
        let mut bytes = Vec::with_capacity(HEADER + PART * self.parts.len());
        bytes.extend(MAGIC.to_le_bytes());
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((self.kind as u16).to_le_bytes());
        bytes.extend(self.sequence.to_le_bytes());
        bytes.extend((self.parts.len() as u32).to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        for part in &self.parts {
            bytes.extend((part.bytes.len() as u32).to_le_bytes());
            bytes.extend((part.files.len() as u32).to_le_bytes());
        }
        bytes.extend(self.parts.iter().flat_map(|part| &part.bytes));
        let files = self.parts.iter().flat_map(|part| part.files.clone()).collect();
        Message { bytes, files }
    }

    fn decode(bytes: &[u8], files: Files) -> Option<Self> {
        let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let half = |at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let kind = half(6)?;
        let kind = Kind::ALL.into_iter().find(|known| *known as u16 == kind)?;
        if word(0)? != MAGIC || half(4)? != VERSION {
            return None;
        }
        let sequence = u64::from_le_bytes(bytes.get(8..16)?.try_into().ok()?);
        let count = word(16)? as usize;
        if count > MAX_PARTS {
            return None;
        }
        let mut rest = bytes.get(HEADER + PART * count..)?;
        let mut files = files.into_iter();
        let mut parts = Vec::with_capacity(count);
        for part in 0..count {
            let at = HEADER + PART * part;
            let (length, number) = (word(at)? as usize, word(at + 4)? as usize);
            let (bytes, behind) = rest.split_at_checked(length)?;
            let files: Files = files.by_ref().take(number).collect();
            if files.len() < number {
                return None;
            }
            parts.push(Message { bytes: bytes.to_vec(), files });
            rest = behind;
        }
        (rest.is_empty() && files.next().is_none()).then_some(Self { kind, sequence, parts })
    }

    /// Sends it, unless that would have to wait: whoever does not read does not stop the guest.
    ///
    /// # Errors
    /// The connection's.
    pub(crate) fn send(&self, link: impl AsFd) -> io::Result<()> {
        message::send(link, &self.encode(), false)
    }

    /// The next packet; `None` at the end. No packet is an error of kind `WouldBlock`.
    ///
    /// # Errors
    /// The connection's; `InvalidData` for a packet of another version, or of nobody.
    pub(crate) fn receive(link: impl AsFd) -> io::Result<Option<Self>> {
        let mut bytes = vec![0; MAX_BYTES];
        let mut files = Files::new();
        let (got, cut) = message::receive(link, &mut bytes, RecvFlags::DONTWAIT, Some(&mut files))?;
        if got == 0 {
            return Ok(None);
        }
        let packet = if cut { None } else { Self::decode(&bytes[..got], files) };
        packet.map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

/// Puts messages into as few packets as there can be: a socket holds few of them.
pub(crate) fn pack(sequence: u64, messages: Vec<Message>) -> Vec<Packet> {
    let mut packets = Vec::new();
    let (mut parts, mut bytes, mut files) = (Vec::new(), 0, 0);
    for message in messages {
        let full = bytes + message.bytes.len() > FULL
            || files + message.files.len() > MAX_FILES
            || parts.len() == MAX_PARTS;
        if full && !parts.is_empty() {
            packets.push(Packet::new(Kind::Said, sequence, std::mem::take(&mut parts)));
            (bytes, files) = (0, 0);
        }
        bytes += message.bytes.len();
        files += message.files.len();
        parts.push(message);
    }
    if !parts.is_empty() {
        packets.push(Packet::new(Kind::Said, sequence, parts));
    }
    packets
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use super::*;

    fn file() -> Files {
        vec![Arc::new(File::open("/dev/null").unwrap().into())]
    }

    #[test]
    fn the_layout_is_the_one_that_is_drawn() {
        let parts = vec![Message { bytes: b"ab".to_vec(), files: file() }, Message::default()];
        let bytes = Packet::new(Kind::Exchange, 5, parts).encode().bytes;
        let expected: &[u8] = b"SMSP\x01\0\x07\0\x05\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\
            \x02\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0ab";
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_packet_arrives_as_it_was() {
        let (near, far) = UnixStream::pair().unwrap();
        let parts = vec![Message { bytes: b"abc".to_vec(), files: file() }, Message::default()];
        Packet::new(Kind::Said, 9, parts).send(&far).unwrap();
        let got = Packet::receive(&near).unwrap().unwrap();
        let parts: Vec<_> = got.parts.iter().map(|p| (p.bytes.len(), p.files.len())).collect();
        assert_eq!((got.kind, got.sequence, parts), (Kind::Said, 9, vec![(3, 1), (0, 0)]));
        drop(far);
        assert!(Packet::receive(&near).unwrap().is_none());
    }

    #[test]
    fn nonsense_and_other_versions_are_refused() {
        let parts = vec![Message { bytes: b"abc".to_vec(), files: Files::new() }];
        let good = Packet::new(Kind::Said, 9, parts).encode().bytes;
        assert!(Packet::decode(&good, Files::new()).is_some());
        assert!(Packet::decode(&good, file()).is_none(), "a file that nobody claims");
        for at in [0, 4, 6, 16, 24, 28] {
            let mut bad = good.clone();
            bad[at] ^= 0x55;
            assert!(Packet::decode(&bad, Files::new()).is_none(), "byte {at}");
        }
        for length in 0..good.len() {
            assert!(Packet::decode(&good[..length], Files::new()).is_none());
        }
    }

    #[test]
    fn many_messages_are_few_packets_and_none_is_lost() {
        let messages: Vec<_> = (0..2000)
            .map(|n| Message::with_files(n, &[0; 40], if n % 3 == 0 { file() } else { vec![] }))
            .collect();
        let packets = pack(1, messages);
        assert!(packets.len() < 10);
        let numbers = packets.iter().flat_map(|packet| &packet.parts).map(Message::request);
        assert!(numbers.eq(0..2000));
        for packet in packets {
            let encoded = packet.encode();
            assert!(encoded.bytes.len() <= MAX_BYTES && encoded.files.len() <= MAX_FILES);
        }
    }
}
