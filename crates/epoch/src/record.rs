//! One slot of the record and the rule. Pure.
//!
//! ```text
//!   offset size  one slot; numbers are little-endian, what is not named is zero
//!   0      8     magic "SVEPOCH1"
//!   8      4     version: 1; 2 while layers stand above the image (`crates/layers`), for which
//!                programs that know none refuse it. Zero is never valid; a greater one is refused,
//!                not overwritten
//!   12     4     CRC-32 (IEEE) of the 512 bytes, with these four as zero
//!   16     8     sequence, from 1; one more with each write, into slot (sequence modulo 2)
//!   24     8     epoch, from 1 (0: the image was given an id and never claimed)
//!   32     16    the image's id
//!   48     16    the id of the claim that has this epoch
//!   64     4     flags; bit 0: released, the holder ended in order
//!   68     4     length of the holder's name
//!   72     40    the name of the host that holds it, UTF-8
//! ```

use std::fmt;

/// Bytes of a slot.
pub const SLOT_BYTES: usize = 512;
/// Bytes of a record's file: two slots.
pub const FILE_BYTES: usize = 2 * SLOT_BYTES;
/// Longest name of a holder, in bytes.
pub const NAME_MAX: usize = 40;

const MAGIC: &[u8; 8] = b"SVEPOCH1";
const VERSION: u32 = 1;
const LAYERED_VERSION: u32 = 2;
const RELEASED: u32 = 1;

/// The id of an image or of a claim.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Id(pub [u8; 16]);

impl Id {
    /// From 32 hexadecimal digits; `None` for anything else.
    pub fn from_hex(text: &str) -> Option<Self> {
        let digits = text.as_bytes();
        if digits.len() != 32 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        u128::from_str_radix(text, 16).ok().map(|number| Self(number.to_be_bytes()))
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// The name of a host; at most [`NAME_MAX`] bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holder(Vec<u8>);

impl Holder {
    /// A name of one byte at least; `None` when it does not fit.
    pub fn new(name: &str) -> Option<Self> {
        (1..=NAME_MAX).contains(&name.len()).then(|| Self(name.as_bytes().to_vec()))
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("nobody");
        }
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

/// By what right somebody writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Greater than that of every claim before it.
    pub epoch: u64,
    /// Random: tells it from one that was given the same epoch.
    pub id: Id,
}

/// The content of a slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// The image's id.
    pub image: Id,
    /// One more with each write.
    pub sequence: u64,
    /// Of the claim in force; 0 when there never was one.
    pub epoch: u64,
    /// Its id.
    pub claim: Id,
    /// Whose it is.
    pub holder: Holder,
    /// The holder ended in order.
    pub released: bool,
    /// The image is not all of the disk: layers stand above it.
    pub layered: bool,
}

/// What a record says to a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It is the claim on record.
    Renewed,
    /// It is newer, and is to be put on record.
    Advanced,
    /// Anything else.
    Stale,
}

/// A slot of a later release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Newer {
    /// The version that it has.
    pub version: u32,
}

impl Record {
    /// Whether this very claim is in force, and its holder has not ended in order.
    pub fn is_held_by(&self, claim: Claim) -> bool {
        self.admit(claim) == Admission::Renewed && !self.released
    }

    /// The rule.
    pub fn admit(&self, claim: Claim) -> Admission {
        if claim.epoch > self.epoch {
            Admission::Advanced
        } else if claim.epoch == self.epoch && claim.id == self.claim {
            Admission::Renewed
        } else {
            Admission::Stale
        }
    }

    /// A slot.
    pub fn encode(&self) -> [u8; SLOT_BYTES] {
        let mut slot = [0; SLOT_BYTES];
        let mut put = |at: usize, bytes: &[u8]| slot[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, MAGIC);
        let version = if self.layered { LAYERED_VERSION } else { VERSION };
        put(8, &version.to_le_bytes());
        put(16, &self.sequence.to_le_bytes());
        put(24, &self.epoch.to_le_bytes());
        put(32, &self.image.0);
        put(48, &self.claim.0);
        put(64, &if self.released { RELEASED } else { 0 }.to_le_bytes());
        put(68, &(self.holder.0.len() as u32).to_le_bytes());
        put(72, &self.holder.0);
        let checksum = crc32(&slot);
        slot[12..16].copy_from_slice(&checksum.to_le_bytes());
        slot
    }

    /// The record in a slot, `None` if it is empty, torn or cut off.
    ///
    /// # Errors
    /// [`Newer`].
    pub fn decode(slot: &[u8]) -> Result<Option<Self>, Newer> {
        let Ok(slot) = <&[u8; SLOT_BYTES]>::try_from(slot) else { return Ok(None) };
        let word = |at: usize| u32::from_le_bytes(bytes_at(slot, at));
        let long = |at: usize| u64::from_le_bytes(bytes_at(slot, at));
        let mut blank = *slot;
        blank[12..16].fill(0);
        let (version, sequence) = (word(8), long(16));
        if !slot.starts_with(MAGIC) || crc32(&blank) != word(12) || version == 0 || sequence == 0 {
            return Ok(None);
        }
        if version > LAYERED_VERSION {
            return Err(Newer { version });
        }
        let length = word(68) as usize;
        if length > NAME_MAX {
            return Ok(None);
        }
        Ok(Some(Self {
            image: Id(bytes_at(slot, 32)),
            sequence,
            epoch: long(24),
            claim: Id(bytes_at(slot, 48)),
            holder: Holder(slot[72..72 + length].to_vec()),
            released: word(64) & RELEASED != 0,
            layered: version == LAYERED_VERSION,
        }))
    }
}

/// The record in force in a file's content: of the valid slots, the one that was written last.
///
/// # Errors
/// [`Newer`], if a slot is.
pub fn newest(content: &[u8]) -> Result<Option<Record>, Newer> {
    let content = &content[..content.len().min(FILE_BYTES)];
    let slots = content.chunks(SLOT_BYTES).map(Record::decode).collect::<Result<Vec<_>, _>>()?;
    Ok(slots.into_iter().flatten().max_by_key(|record| record.sequence))
}

fn bytes_at<const N: usize>(slot: &[u8; SLOT_BYTES], at: usize) -> [u8; N] {
    std::array::from_fn(|i| slot[at + i])
}

/// CRC-32 as in IEEE 802.3, bit by bit: it is for 512 bytes, now and then.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 * (crc & 1)))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const C1: Id = Id([0x11; 16]);
    const C2: Id = Id([0x22; 16]);

    fn held() -> Record {
        let image = Id::from_hex("0123456789abcdef0123456789abcdef").unwrap();
        let holder = Holder::new("höst").unwrap();
        let (sequence, epoch, claim) = (3, 7, C2);
        Record { image, sequence, epoch, claim, holder, released: true, layered: false }
    }

    /// The bytes of `tests/unit/test_store_epoch.py`, by hand. The checksum is what Python's zlib
    /// says of them.
    #[test]
    fn the_layout_is_the_one_that_is_drawn() {
        let mut expected = [0; SLOT_BYTES];
        expected[0..8].copy_from_slice(b"SVEPOCH1");
        expected[8] = 1;
        expected[12..16].copy_from_slice(&0x9ed8_e234u32.to_le_bytes());
        expected[16] = 3;
        expected[24] = 7;
        for half in [32, 40] {
            expected[half..half + 8]
                .copy_from_slice(&[0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef]);
        }
        expected[48..64].fill(0x22);
        expected[64] = 1;
        expected[68] = 5;
        expected[72..77].copy_from_slice("höst".as_bytes());
        assert_eq!(held().encode(), expected);
        assert_eq!(Record::decode(&expected), Ok(Some(held())));
    }

    #[test]
    fn the_rule() {
        let record = Record { claim: C1, ..held() };
        let said = |epoch, id| record.admit(Claim { epoch, id });
        assert_eq!(said(8, C2), Admission::Advanced);
        assert_eq!(said(8, C1), Admission::Advanced);
        assert_eq!(said(7, C1), Admission::Renewed);
        assert_eq!(said(7, C2), Admission::Stale);
        assert_eq!(said(6, C1), Admission::Stale);
        assert_eq!(said(0, C1), Admission::Stale);
    }

    #[test]
    fn ids_and_names_are_what_they_say() {
        assert_eq!(Id::from_hex(&held().image.to_string()), Some(held().image));
        for wrong in
            ["", "+1", "0123456789abcdef0123456789abcdeg", "ü123456789abcdef0123456789abcde"]
        {
            assert_eq!(Id::from_hex(wrong), None);
        }
        assert_eq!(Id::from_hex(&format!("+{}", "1".repeat(31))), None);
        assert_eq!(Holder::new(""), None);
        assert_eq!(Holder::new(&"x".repeat(41)), None);
    }

    proptest! {
        #[test]
        fn a_slot_with_any_wrong_byte_is_no_record(place in 0..SLOT_BYTES, change in 1u8..) {
            let mut slot = held().encode();
            slot[place] ^= change;
            prop_assert_eq!(Record::decode(&slot), Ok(None));
        }

        /// The checksum is made right, so that what comes after it is reached.
        #[test]
        fn any_bytes_are_decoded_or_refused(
            mut bytes in prop::collection::vec(any::<u8>(), 0..=FILE_BYTES + 8),
            version in 0u32..4,
            sign in any::<bool>(),
        ) {
            if sign && bytes.len() >= SLOT_BYTES {
                bytes[..8].copy_from_slice(MAGIC);
                bytes[8..12].copy_from_slice(&version.to_le_bytes());
                bytes[12..16].fill(0);
                bytes[70..72].fill(0);
                let checksum = crc32(&bytes[..SLOT_BYTES]);
                bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
            }
            if let Ok(Some(record)) = newest(&bytes) {
                let again = Record::decode(&record.encode());
                prop_assert_eq!(again, Ok(Some(record)));
            }
        }
    }

    #[test]
    fn an_image_with_layers_has_a_version_that_earlier_releases_refuse() {
        let layered = Record { layered: true, ..held() };
        let slot = layered.encode();
        assert_eq!(slot[8], 2);
        assert_eq!(Record::decode(&slot), Ok(Some(layered)));
    }

    #[test]
    fn a_later_version_is_refused() {
        let mut slot = held().encode();
        slot[8] = 3;
        slot[12..16].fill(0);
        let checksum = crc32(&slot);
        slot[12..16].copy_from_slice(&checksum.to_le_bytes());
        assert_eq!(Record::decode(&slot), Err(Newer { version: 3 }));
    }
}
