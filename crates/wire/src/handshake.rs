//! What the two ends agree upon before the first byte of the stream.

use crate::format::{self, Frame, Hello, Kind, MAX_DISKS, NEWEST, OLDEST, Reader, WireError};

/// What holds for the rest of the conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// Version of the format.
    pub version: u16,
    /// What both can do.
    pub features: u64,
    /// Bytes of the stream that may be under way.
    pub window: u64,
}

/// Agrees, from what this end said and what it heard. Both ends come to the same result.
///
/// # Errors
/// No version in common, another migration, or two ends of the same kind.
pub fn agree(ours: &Hello, theirs: &Hello) -> Result<Agreement, WireError> {
    if ours.role == theirs.role {
        return Err(WireError::Protocol("two sources, or two destinations"));
    }
    let version = ours.versions.1.min(theirs.versions.1);
    if version < ours.versions.0.max(theirs.versions.0) {
        let program = theirs.program.clone();
        return Err(WireError::Version { theirs: theirs.versions, program });
    }
    if ours.migration != theirs.migration {
        let (theirs, ours) = (theirs.migration.clone(), ours.migration.clone());
        return Err(WireError::Migration { theirs, ours });
    }
    let features = ours.features & theirs.features;
    Ok(Agreement { version, features, window: ours.window.min(theirs.window) })
}

/// A disk that the source would like to refer to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfferedDisk {
    /// The same at both ends.
    pub name: String,
    /// Bytes.
    pub size: u64,
}

/// What the source says once it has agreed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// The version that is spoken.
    pub version: u16,
    /// What is in force.
    pub features: u64,
    /// Key of all hashes: made for this migration, unknown to the guest.
    pub key: [u8; 32],
    /// Disks; a reference names one by its place here.
    pub disks: Vec<OfferedDisk>,
}

impl Start {
    /// The frame. Disks beyond [`MAX_DISKS`] are left out.
    pub fn to_frame(&self) -> Vec<u8> {
        let mut frame = format::begin(Kind::Start);
        frame.extend_from_slice(&self.version.to_le_bytes());
        frame.extend_from_slice(&[0, 0]);
        frame.extend_from_slice(&self.features.to_le_bytes());
        frame.extend_from_slice(&self.key);
        let disks = &self.disks[..self.disks.len().min(MAX_DISKS)];
        frame.extend_from_slice(&(disks.len() as u16).to_le_bytes());
        for disk in disks {
            frame.extend_from_slice(&disk.size.to_le_bytes());
            format::put_text(&mut frame, &disk.name);
        }
        format::finish(frame)
    }

    /// From a payload that nobody vouches for; it must be what was agreed upon.
    ///
    /// # Errors
    /// Another version or more features than that, or fields that cannot be.
    pub fn parse(payload: &[u8], agreed: &Agreement) -> Result<Self, WireError> {
        let mut reader = Reader(payload);
        let version = reader.u16()?;
        let _ = reader.u16()?;
        let (features, key) = (reader.u64()?, reader.array()?);
        if version != agreed.version || !(OLDEST..=NEWEST).contains(&version) {
            return Err(WireError::Protocol("another version than was agreed upon"));
        }
        if features & !agreed.features != 0 {
            return Err(WireError::Protocol("features that were not agreed upon"));
        }
        let count = usize::from(reader.u16()?);
        if count > MAX_DISKS {
            return Err(WireError::Protocol("too many disks"));
        }
        let disk = |reader: &mut Reader<'_>| {
            let size = reader.u64()?;
            Ok(OfferedDisk { name: reader.text()?, size })
        };
        let disks = (0..count).map(|_| disk(&mut reader)).collect::<Result<_, WireError>>()?;
        Ok(Self { version, features, key, disks })
    }
}

/// The destination's answer: which of the disks it can read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ready {
    /// By the places in [`Start::disks`].
    pub readable: Vec<bool>,
}

impl Ready {
    /// The frame.
    pub fn to_frame(&self) -> Vec<u8> {
        let mut frame = format::begin(Kind::Ready);
        frame.extend_from_slice(&(self.readable.len() as u16).to_le_bytes());
        frame.extend(self.readable.iter().map(|&readable| u8::from(readable)));
        format::finish(frame)
    }

    /// From a payload that nobody vouches for; it must speak of that many disks.
    ///
    /// # Errors
    /// Another number of disks.
    pub fn parse(payload: &[u8], disks: usize) -> Result<Self, WireError> {
        let mut reader = Reader(payload);
        if usize::from(reader.u16()?) != disks {
            return Err(WireError::Protocol("an answer about other disks"));
        }
        Ok(Self { readable: reader.take(disks)?.iter().map(|&byte| byte == 1).collect() })
    }
}

impl Hello {
    /// As [`Hello::parse`], of the first frame that came.
    ///
    /// # Errors
    /// It is no HELLO, or the peer gave up.
    pub fn of_frame(frame: &Frame<'_>) -> Result<Self, WireError> {
        match frame.kind {
            Some(Kind::Hello) => Hello::parse(frame.payload),
            Some(Kind::Abort) => Err(format::parse_abort(frame.payload)),
            _ => Err(WireError::Protocol("something before the greeting")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{FEATURE_REFERENCES, FEATURE_ZSTD, Role, first_frame};

    fn pair() -> (Hello, Hello) {
        (Hello::new(Role::Source, 64 << 20, "m"), Hello::new(Role::Destination, 16 << 20, "m"))
    }

    #[test]
    fn both_ends_agree_on_the_same() {
        let (source, destination) = pair();
        let agreed = agree(&source, &destination).unwrap();
        assert_eq!(agree(&destination, &source).unwrap(), agreed);
        assert_eq!((agreed.version, agreed.window), (1, 16 << 20));
    }

    #[test]
    fn an_older_and_a_newer_release_speak_what_both_know() {
        let (mut source, destination) = pair();
        source.versions = (1, 7);
        source.features |= 1 << 40;
        let agreed = agree(&destination, &source).unwrap();
        assert_eq!((agreed.version, agreed.features), (1, FEATURE_REFERENCES | FEATURE_ZSTD));
        // What the newer one adds to its greeting is ignored.
        let mut frame = source.to_frame();
        frame.extend_from_slice(b"more");
        let (frame, _) = first_frame(&frame).unwrap().unwrap();
        let longer = [frame.payload, b"more"].concat();
        assert_eq!(Hello::parse(&longer).unwrap(), source);
        source.versions = (2, 7);
        assert!(matches!(agree(&destination, &source), Err(WireError::Version { .. })));
    }

    #[test]
    fn ends_of_different_migrations_do_not_talk() {
        let (mut source, destination) = pair();
        source.migration = "other".to_owned();
        assert!(matches!(agree(&source, &destination), Err(WireError::Migration { .. })));
        assert!(agree(&destination, &destination).is_err());
    }

    #[test]
    fn start_and_ready_come_back() {
        let (source, destination) = pair();
        let agreed = agree(&source, &destination).unwrap();
        let disks = vec![OfferedDisk { name: "root".to_owned(), size: 1 << 30 }];
        let start = Start { version: 1, features: agreed.features, key: [7; 32], disks };
        let bytes = start.to_frame();
        let (frame, len) = first_frame(&bytes).unwrap().unwrap();
        assert_eq!(len, bytes.len());
        assert_eq!(Start::parse(frame.payload, &agreed).unwrap(), start);
        let more = Start { features: 1 << 20, ..start };
        let bytes = more.to_frame();
        let (frame, _) = first_frame(&bytes).unwrap().unwrap();
        assert!(Start::parse(frame.payload, &agreed).is_err());
        let ready = Ready { readable: vec![true, false] };
        let bytes = ready.to_frame();
        let (frame, _) = first_frame(&bytes).unwrap().unwrap();
        assert_eq!(Ready::parse(frame.payload, 2).unwrap(), ready);
        assert!(Ready::parse(frame.payload, 3).is_err());
    }
}
