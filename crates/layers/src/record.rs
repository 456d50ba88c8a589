//! The record of a chain, `IMAGE.layers/record`: which layers stand above an image, and who reads them. Pure.
//!
//! ```text
//!   offset size  one slot; numbers are little-endian, what is not named is zero
//!   0      8     magic "SVLAYER1"
//!   8      4     version: 1. Zero is never valid; a greater one is refused, not overwritten
//!   12     4     CRC-32 (IEEE) of the 4096 bytes, with these four as zero
//!   16     8     sequence, from 1; one more with each write, into slot (sequence modulo 2)
//!   24     8     epoch of who wrote it, 0 without a claim
//!   32     16    the claim of who wrote it
//!   48     16    the id of the chain, random, given once: each layer's files have it as well
//!   64     8     the id that the next layer gets, from 1; it never shrinks
//!   72     2     layers, at most 16
//!   74     2     pins, at most 32
//!   128    1024  layers, 64 bytes each, the lowest first
//!                  0   8   id, greater than that of the one below
//!                  8   8   epoch under which its files are written, and no other
//!                  16  16  the claim that has this epoch
//!                  32  8   bytes of the disk while it was the highest
//!                  40  8   seconds since 1970 at which it was opened
//!                  48  1   state: 1 opened, 2 sealed, 3 lapsed, 4 merging, 5 dropped
//!                  49  1   flags; bit 0: the guest's file systems were frozen at that instant
//!   1152   2048  pins, 64 bytes each
//!                  0   8   snapshot
//!                  8   1   length of the name
//!                  16  40  who reads it, UTF-8
//! ```
//!
//! A *snapshot* has the id of the layer that was opened above it: it is what lies below that layer.
//!
//! ```text
//!   opened ──what lies below is on the medium──► sealed ──nobody wants the snapshot──► lapsed
//!      └──── the process died before; no snapshot was told ───────────────────────────────▲
//!   sealed, lapsed ──the lowest, what is above is not opened, no pin on it or below──► merging
//!   sealed, lapsed ──the only one, nobody serves the disk, no pin on it──► merging
//!   opened, sealed, lapsed ──the highest, no block in it, no pin on it──► gone
//!   merging ──its blocks are in the image, and flushed──► dropped ──nobody has it open──► gone
//! ```

use semper_epoch::{Claim, Holder, Id};

use crate::mistake::{Mistake, made};

/// Bytes of a slot.
pub const SLOT_BYTES: usize = 4096;
/// Bytes of a record's file: two slots.
pub const FILE_BYTES: usize = 2 * SLOT_BYTES;
/// Most layers that a record names, those that are dropped included.
pub const LAYERS_MAX: usize = 16;
/// Most pins that a record names.
pub const PINS_MAX: usize = 32;
/// Most layers that a disk is served with.
pub const CHAIN_MAX: usize = 4;

const MAGIC: &[u8; 8] = b"SVLAYER1";
const VERSION: u32 = 1;
const LAYERS_AT: usize = 128;
const PINS_AT: usize = LAYERS_AT + LAYERS_MAX * ENTRY_BYTES;
const ENTRY_BYTES: usize = 64;
const FROZEN: u8 = 1;

/// The number of a layer, from 1, and of the snapshot that it was opened above.
pub type LayerId = u64;

/// What has become of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// It may take writes. What lies below may not be on the medium yet: there is no snapshot.
    Opened = 1,
    /// What lies below is on the medium and does not change: that is a snapshot.
    Sealed = 2,
    /// The same, and nobody wants the snapshot.
    Lapsed = 3,
    /// Its blocks are being copied into the image: there is no snapshot below it any more.
    Merging = 4,
    /// Its blocks are in the image; its files stay while somebody may have them open.
    Dropped = 5,
}

impl State {
    fn of(byte: u8) -> Option<Self> {
        [Self::Opened, Self::Sealed, Self::Lapsed, Self::Merging, Self::Dropped]
            .into_iter()
            .find(|state| *state as u8 == byte)
    }

    /// In statuses and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::Sealed => "sealed",
            Self::Lapsed => "lapsed",
            Self::Merging => "merging",
            Self::Dropped => "dropped",
        }
    }
}

/// One layer, as the record has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its number.
    pub id: LayerId,
    /// Who writes its files, and nobody else ever.
    pub writer: Claim,
    /// Bytes of the disk while it was the highest.
    pub size: u64,
    /// Seconds since 1970 at which it was opened.
    pub time: u64,
    /// What has become of it.
    pub state: State,
    /// The guest's file systems were frozen when it was opened.
    pub frozen: bool,
}

/// Somebody reads a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// Which.
    pub snapshot: LayerId,
    /// Who.
    pub reader: Holder,
}

/// The content of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// One more with each write.
    pub sequence: u64,
    /// Who wrote it; epoch 0 without a claim.
    pub writer: Claim,
    /// Tells this chain's files from another's.
    pub chain: Id,
    /// What the next layer is called.
    pub next: LayerId,
    /// The lowest first; those that were dropped come before all others.
    pub layers: Vec<Layer>,
    /// Who reads which snapshot.
    pub pins: Vec<Pin>,
}

/// A slot of a later release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Newer {
    /// The version that it has.
    pub version: u32,
}

/// Who writes where there are no claims.
pub const NOBODY: Claim = Claim { epoch: 0, id: Id([0; 16]) };

/// Why something is not done to a chain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too many layers.
    #[error(
        "the disk has {0} layers, and a chain is not served with more; merge some (merge), and \
         remove the pins that stand against it"
    )]
    Full(usize),
    /// Too many layers whose files somebody has open.
    #[error("the files of {0} layers are kept for readers of snapshots; end those readers (unpin)")]
    Kept(usize),
    /// Too many readers.
    #[error("{0} readers have pins already; end some (unpin)")]
    Pins(usize),
    /// There is none.
    #[error("there is no snapshot {0} that can be read; see the list of them (layers)")]
    Missing(LayerId),
    /// It would be destroyed under a reader.
    #[error(
        "layer {layer} cannot be merged: snapshot {snapshot}, which does not have its blocks, is \
         read by {reader}; end that reader, or remove its pin (unpin)"
    )]
    Pinned {
        /// What was to be merged.
        layer: LayerId,
        /// What is read.
        snapshot: LayerId,
        /// By whom.
        reader: Holder,
    },
    /// There is nothing below the layer that takes writes.
    #[error("there is no layer that can be merged: the only one takes the guest's writes")]
    Nothing,
    /// The record was written, and could not be flushed.
    #[error(
        "the record of the layers could not be flushed, and nobody knows what a power cut would leave; \
         see to the storage, then start the backend anew (its spare goes on with what is on record)"
    )]
    Torn,
    /// What lies above it may not be on the medium.
    #[error("a snapshot is being taken; try again when it is sealed")]
    Busy,
}

impl Record {
    /// That of an image without layers, not written yet.
    pub fn new(chain: Id, writer: Claim) -> Self {
        Self { sequence: 0, writer, chain, next: 1, layers: Vec::new(), pins: Vec::new() }
    }

    /// The layers that are read, the lowest first.
    pub fn chain(&self) -> &[Layer] {
        let dropped = self.layers.iter().take_while(|layer| layer.state == State::Dropped).count();
        &self.layers[dropped..]
    }

    /// The layers whose files are only kept for readers.
    pub fn dropped(&self) -> &[Layer] {
        &self.layers[..self.layers.len() - self.chain().len()]
    }

    /// The layer that takes writes.
    pub fn top(&self) -> Option<&Layer> {
        self.chain().last()
    }

    /// A layer that is read.
    pub fn layer(&self, id: LayerId) -> Option<&Layer> {
        self.chain().iter().find(|layer| layer.id == id)
    }

    /// Whether a snapshot can be read, and goes on being there while it has a pin.
    pub fn has_snapshot(&self, id: LayerId) -> bool {
        self.layer(id).is_some_and(|layer| matches!(layer.state, State::Sealed | State::Lapsed))
    }

    /// Opens a layer above all others, if there are fewer than `most`: gives its number.
    ///
    /// # Errors
    /// [`Refused::Full`], [`Refused::Kept`], [`Refused::Busy`].
    pub fn open(&mut self, layer: Layer, most: usize) -> Result<LayerId, Refused> {
        let chain = self.chain();
        if chain.len() >= most {
            return Err(Refused::Full(chain.len()));
        }
        if self.layers.len() >= LAYERS_MAX {
            return Err(Refused::Kept(self.layers.len() - chain.len()));
        }
        if self.top().is_some_and(|top| top.state == State::Opened) {
            return Err(Refused::Busy);
        }
        let id = self.next;
        self.layers.push(Layer { id, state: State::Opened, ..layer });
        self.next += 1;
        Ok(id)
    }

    /// What is below a layer is on the medium: `told`, and there is a snapshot.
    pub fn seal(&mut self, id: LayerId, told: bool) {
        let state = if told { State::Sealed } else { State::Lapsed };
        self.change(id, State::Opened, state);
    }

    /// Nobody wants a snapshot any more; it goes with the next merge.
    ///
    /// # Errors
    /// [`Refused::Missing`].
    pub fn lapse(&mut self, snapshot: LayerId) -> Result<(), Refused> {
        if !self.has_snapshot(snapshot) {
            return Err(Refused::Missing(snapshot));
        }
        self.change(snapshot, State::Sealed, State::Lapsed);
        Ok(())
    }

    /// The layer that can be merged into the image: the lowest.
    ///
    /// # Errors
    /// [`Refused::Nothing`], [`Refused::Busy`], [`Refused::Pinned`].
    pub fn mergeable(&self) -> Result<LayerId, Refused> {
        let [lowest, above, ..] = self.chain() else { return Err(Refused::Nothing) };
        if lowest.state == State::Opened || above.state == State::Opened {
            return Err(Refused::Busy);
        }
        self.require_unpinned(lowest.id, |read| read <= lowest.id)
    }

    /// The layer whose blocks can go up into the highest one: that below it. Nobody wants the snapshot
    /// below either of the two, and the layers under them are kept for snapshots that somebody wants.
    ///
    /// # Errors
    /// [`Refused::Nothing`], [`Refused::Pinned`].
    pub fn liftable(&self) -> Result<LayerId, Refused> {
        let [_, .., below, top] = self.chain() else { return Err(Refused::Nothing) };
        if below.state != State::Lapsed || top.state != State::Lapsed {
            return Err(Refused::Nothing);
        }
        self.require_unpinned(below.id, |read| read == below.id || read == top.id)
    }

    /// The blocks of what [`Record::liftable`] gives are in the highest layer, on the medium: it is read no
    /// more.
    ///
    /// # Errors
    /// As there: somebody has pinned it meanwhile.
    pub fn lift(&mut self) -> Result<LayerId, Refused> {
        let lifted = self.liftable()?;
        self.layers.retain(|layer| layer.id != lifted);
        Ok(lifted)
    }

    /// The layer that can be merged into the image where nobody serves the disk: the only one.
    ///
    /// # Errors
    /// [`Refused::Nothing`], [`Refused::Busy`], [`Refused::Pinned`].
    pub fn foldable(&self) -> Result<LayerId, Refused> {
        let [only] = self.chain() else { return Err(Refused::Nothing) };
        if only.state == State::Opened {
            return Err(Refused::Busy);
        }
        self.require_unpinned(only.id, |read| read <= only.id)
    }

    /// Begins to merge what [`Record::foldable`] gives. A process that serves the disk later may find it
    /// so, and writes to it: what is in the image already is covered by the layer.
    ///
    /// # Errors
    /// As there.
    pub fn begin_fold(&mut self) -> Result<LayerId, Refused> {
        let layer = self.foldable()?;
        self.change(layer, State::Sealed, State::Merging);
        self.change(layer, State::Lapsed, State::Merging);
        Ok(layer)
    }

    /// Takes out the highest layer, which has no block: what lies below it goes on taking writes.
    ///
    /// # Errors
    /// [`Refused::Missing`] if it is not the highest, [`Refused::Pinned`].
    pub fn take_back(&mut self, id: LayerId) -> Result<(), Refused> {
        let highest = self.top().is_some_and(|top| top.id == id && top.state != State::Merging);
        if !highest {
            return Err(Refused::Missing(id));
        }
        self.require_unpinned(id, |read| read == id)?;
        self.layers.pop();
        Ok(())
    }

    /// The layer, if nobody has pinned a snapshot that is `read` with it.
    fn require_unpinned(
        &self,
        layer: LayerId,
        read: impl Fn(LayerId) -> bool,
    ) -> Result<LayerId, Refused> {
        match self.pins.iter().find(|pin| read(pin.snapshot)) {
            Some(Pin { snapshot, reader }) => {
                Err(Refused::Pinned { layer, snapshot: *snapshot, reader: reader.clone() })
            }
            None => Ok(layer),
        }
    }

    /// Begins to merge what [`Record::mergeable`] gives.
    ///
    /// # Errors
    /// As there.
    pub fn begin_merge(&mut self) -> Result<LayerId, Refused> {
        let layer = match self.mergeable() {
            Err(Refused::Pinned { layer, .. }) if made(Mistake::MergePinned) => {
                self.pins.retain(|pin| pin.snapshot > layer);
                layer
            }
            mergeable => mergeable?,
        };
        self.change(layer, State::Sealed, State::Merging);
        self.change(layer, State::Lapsed, State::Merging);
        Ok(layer)
    }

    /// The blocks of a layer are in the image, on the medium.
    pub fn drop_layer(&mut self, id: LayerId) {
        self.change(id, State::Merging, State::Dropped);
    }

    /// Takes out the layers that were dropped and that nobody has open; gives them.
    pub fn forget_dropped(&mut self) -> Vec<Layer> {
        let Self { layers, pins, .. } = self;
        let open = |id| pins.iter().any(|pin| pin.snapshot > id);
        let forgotten = |layer: &Layer| layer.state == State::Dropped && !open(layer.id);
        let gone = layers.iter().copied().filter(forgotten).collect();
        layers.retain(|layer| !forgotten(layer));
        gone
    }

    /// Notes that `reader` reads a snapshot that was not given up; the same once more is no change.
    ///
    /// # Errors
    /// [`Refused::Missing`], [`Refused::Pins`].
    pub fn pin(&mut self, pin: Pin) -> Result<(), Refused> {
        if self.pins.contains(&pin) {
            return Ok(());
        }
        // What lies below a layer that has lapsed may be lifted into it.
        if self.layer(pin.snapshot).is_none_or(|layer| layer.state != State::Sealed) {
            return Err(Refused::Missing(pin.snapshot));
        }
        if self.pins.len() >= PINS_MAX {
            return Err(Refused::Pins(self.pins.len()));
        }
        self.pins.push(pin);
        Ok(())
    }

    /// Takes out a pin; false if there was none.
    pub fn unpin(&mut self, pin: &Pin) -> bool {
        let before = self.pins.len();
        self.pins.retain(|known| known != pin);
        self.pins.len() < before
    }

    fn change(&mut self, id: LayerId, from: State, to: State) {
        let layer = self.layers.iter_mut().find(|layer| layer.id == id && layer.state == from);
        if let Some(layer) = layer {
            layer.state = to;
        }
    }

    /// Whether the rules of the module hold.
    fn makes_sense(&self) -> bool {
        let ids = || self.layers.iter().map(|layer| layer.id);
        let below = |n: usize| self.layers[..n].iter();
        let grow = ids().zip(ids().skip(1)).all(|(low, high)| low < high);
        let in_order = self.layers.iter().enumerate().all(|(n, layer)| match layer.state {
            State::Opened => n + 1 == self.layers.len(),
            State::Sealed | State::Lapsed => true,
            State::Merging | State::Dropped => below(n).all(|l| l.state == State::Dropped),
        });
        let numbered = self.next > 0 && ids().all(|id| id > 0 && id < self.next);
        grow && in_order && numbered && self.pins.iter().all(|pin| self.has_snapshot(pin.snapshot))
    }

    /// A slot. At most [`LAYERS_MAX`] layers and [`PINS_MAX`] pins are written.
    pub fn encode(&self) -> [u8; SLOT_BYTES] {
        let mut slot = [0; SLOT_BYTES];
        let mut put = |at: usize, bytes: &[u8]| slot[at..at + bytes.len()].copy_from_slice(bytes);
        let layers = &self.layers[..self.layers.len().min(LAYERS_MAX)];
        let pins = &self.pins[..self.pins.len().min(PINS_MAX)];
        put(0, MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(16, &self.sequence.to_le_bytes());
        put(24, &self.writer.epoch.to_le_bytes());
        put(32, &self.writer.id.0);
        put(48, &self.chain.0);
        put(64, &self.next.to_le_bytes());
        put(72, &(layers.len() as u16).to_le_bytes());
        put(74, &(pins.len() as u16).to_le_bytes());
        for (n, layer) in layers.iter().enumerate() {
            let at = LAYERS_AT + n * ENTRY_BYTES;
            put(at, &layer.id.to_le_bytes());
            put(at + 8, &layer.writer.epoch.to_le_bytes());
            put(at + 16, &layer.writer.id.0);
            put(at + 32, &layer.size.to_le_bytes());
            put(at + 40, &layer.time.to_le_bytes());
            put(at + 48, &[layer.state as u8, if layer.frozen { FROZEN } else { 0 }]);
        }
        for (n, pin) in pins.iter().enumerate() {
            let (at, name) = (PINS_AT + n * ENTRY_BYTES, pin.reader.to_string());
            put(at, &pin.snapshot.to_le_bytes());
            put(at + 8, &[name.len() as u8]);
            put(at + 16, name.as_bytes());
        }
        let checksum = crc32(&slot);
        slot[12..16].copy_from_slice(&checksum.to_le_bytes());
        slot
    }

    /// The record in a slot, `None` if it is empty, torn, cut off or makes no sense.
    ///
    /// # Errors
    /// [`Newer`].
    pub fn decode(slot: &[u8]) -> Result<Option<Self>, Newer> {
        let Ok(slot) = <&[u8; SLOT_BYTES]>::try_from(slot) else { return Ok(None) };
        let mut blank = *slot;
        blank[12..16].fill(0);
        let version = word(slot, 8);
        if !slot.starts_with(MAGIC) || crc32(&blank) != word(slot, 12) || version == 0 {
            return Ok(None);
        }
        if version > VERSION {
            return Err(Newer { version });
        }
        let count = |at| usize::from(u16::from_le_bytes(bytes_at(slot, at)));
        let (layers, pins) = (count(72), count(74));
        if layers > LAYERS_MAX || pins > PINS_MAX {
            return Ok(None);
        }
        let at = |n: usize| LAYERS_AT + n * ENTRY_BYTES;
        let layers = (0..layers).map(|n| layer_at(slot, at(n))).collect::<Option<_>>();
        let at = |n: usize| PINS_AT + n * ENTRY_BYTES;
        let pins = (0..pins).map(|n| pin_at(slot, at(n))).collect::<Option<_>>();
        let Some((layers, pins)) = layers.zip(pins) else { return Ok(None) };
        let record = Self {
            sequence: long(slot, 16),
            writer: claim_at(slot, 24),
            chain: Id(bytes_at(slot, 48)),
            next: long(slot, 64),
            layers,
            pins,
        };
        Ok(Some(record).filter(|record| record.sequence > 0 && record.makes_sense()))
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

fn layer_at(slot: &[u8; SLOT_BYTES], at: usize) -> Option<Layer> {
    Some(Layer {
        id: long(slot, at),
        writer: claim_at(slot, at + 8),
        size: long(slot, at + 32),
        time: long(slot, at + 40),
        state: State::of(slot[at + 48])?,
        frozen: slot[at + 49] & FROZEN != 0,
    })
}

fn pin_at(slot: &[u8; SLOT_BYTES], at: usize) -> Option<Pin> {
    let name = slot.get(at + 16..at + 16 + usize::from(slot[at + 8]))?;
    let reader = std::str::from_utf8(name).ok().and_then(Holder::new)?;
    Some(Pin { snapshot: long(slot, at), reader })
}

fn claim_at(slot: &[u8; SLOT_BYTES], at: usize) -> Claim {
    Claim { epoch: long(slot, at), id: Id(bytes_at(slot, at + 8)) }
}

fn word(slot: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(slot, at))
}

fn long(slot: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(slot, at))
}

pub(crate) fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut crc, mut bit) = (byte as u32, 0);
        while bit < 8 {
            crc = (crc >> 1) ^ (0xedb8_8320 * (crc & 1));
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

/// CRC-32 as in IEEE 802.3.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, &byte: &u8| (crc >> 8) ^ CRC_TABLE[usize::from(crc as u8 ^ byte)];
    !bytes.iter().fold(!0, step)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const C1: Id = Id([0x11; 16]);

    fn layer(id: LayerId, state: State) -> Layer {
        let writer = Claim { epoch: 7, id: C1 };
        Layer { id, writer, size: 1 << 30, time: 1_700_000_000, state, frozen: id == 5 }
    }

    fn reader(name: &str) -> Holder {
        Holder::new(name).unwrap()
    }

    fn held() -> Record {
        Record {
            sequence: 3,
            writer: Claim { epoch: 8, id: Id([0x22; 16]) },
            chain: Id([0x33; 16]),
            next: 6,
            layers: vec![
                layer(2, State::Dropped),
                layer(3, State::Merging),
                layer(4, State::Lapsed),
                layer(5, State::Sealed),
            ],
            pins: vec![Pin { snapshot: 5, reader: reader("höst") }],
        }
    }

    /// By hand; the checksum is what Python's zlib says of these bytes.
    #[test]
    fn the_layout_is_the_one_that_is_drawn() {
        let mut expected = [0; SLOT_BYTES];
        expected[0..8].copy_from_slice(b"SVLAYER1");
        expected[8] = 1;
        expected[16] = 3;
        expected[24] = 8;
        expected[32..48].fill(0x22);
        expected[48..64].fill(0x33);
        expected[64] = 6;
        expected[72] = 4;
        expected[74] = 1;
        for (n, (id, state)) in [(2, 5), (3, 4), (4, 3), (5, 2)].into_iter().enumerate() {
            let entry = &mut expected[128 + 64 * n..128 + 64 * (n + 1)];
            entry[0] = id;
            entry[8] = 7;
            entry[16..32].fill(0x11);
            entry[35] = 0x40;
            entry[40..44].copy_from_slice(&1_700_000_000u32.to_le_bytes());
            entry[48] = state;
            entry[49] = u8::from(id == 5);
        }
        expected[1152] = 5;
        expected[1160] = 5;
        expected[1168..1173].copy_from_slice("höst".as_bytes());
        expected[12..16].copy_from_slice(&CHECKSUM.to_le_bytes());
        assert_eq!(held().encode(), expected);
        assert_eq!(Record::decode(&expected), Ok(Some(held())));
    }

    const CHECKSUM: u32 = 0x76e2_3b13;

    #[test]
    fn a_later_version_is_refused() {
        let mut slot = held().encode();
        slot[8] = 2;
        slot[12..16].fill(0);
        let checksum = crc32(&slot);
        slot[12..16].copy_from_slice(&checksum.to_le_bytes());
        assert_eq!(Record::decode(&slot), Err(Newer { version: 2 }));
    }

    #[test]
    fn what_breaks_the_rules_is_no_record() {
        let mut wrong: Vec<Record> = Vec::new();
        let mut add = |change: &dyn Fn(&mut Record)| {
            let mut record = held();
            change(&mut record);
            wrong.push(record);
        };
        add(&|r| r.sequence = 0);
        add(&|r| r.next = 5);
        add(&|r| r.layers[3].id = 4);
        add(&|r| r.layers[1].id = 0);
        add(&|r| r.layers[2].state = State::Opened);
        add(&|r| r.layers[2].state = State::Merging);
        add(&|r| r.layers[3].state = State::Dropped);
        add(&|r| r.pins[0].snapshot = 3);
        add(&|r| r.pins[0].snapshot = 6);
        for record in wrong {
            assert_eq!(Record::decode(&record.encode()), Ok(None), "{record:?}");
        }
    }

    #[test]
    fn a_snapshot_is_sealed_and_merged_by_the_rules() {
        let mut record = Record::new(Id([1; 16]), NOBODY);
        let new = layer(0, State::Opened);
        assert_eq!(record.mergeable(), Err(Refused::Nothing));
        assert_eq!(record.open(new, CHAIN_MAX), Ok(1));
        assert_eq!(record.open(new, CHAIN_MAX), Err(Refused::Busy));
        assert!(!record.has_snapshot(1));
        record.seal(1, true);
        assert!(record.has_snapshot(1));
        assert_eq!(record.mergeable(), Err(Refused::Nothing), "it takes writes");
        assert_eq!(record.open(new, CHAIN_MAX), Ok(2));
        assert_eq!(record.mergeable(), Err(Refused::Busy));
        let mut untold = record.clone();
        untold.seal(2, false);
        assert_eq!(untold.layer(2).unwrap().state, State::Lapsed);
        record.seal(2, true);
        let pin = |snapshot| Pin { snapshot, reader: reader("b") };
        assert_eq!(untold.pin(pin(2)), Err(Refused::Missing(2)), "nobody was told of it");
        record.pin(pin(1)).unwrap();
        record.pin(pin(1)).unwrap();
        assert_eq!(record.pin(pin(3)), Err(Refused::Missing(3)));
        let refused = Refused::Pinned { layer: 1, snapshot: 1, reader: reader("b") };
        assert_eq!(record.begin_merge(), Err(refused));
        assert!(record.unpin(&pin(1)) && !record.unpin(&pin(1)));
        // Who reads the snapshot above has the layer open, and its blocks go on being there.
        record.pin(pin(2)).unwrap();
        assert_eq!(record.begin_merge(), Ok(1));
        assert_eq!(record.pin(pin(1)), Err(Refused::Missing(1)), "it is being destroyed");
        assert_eq!(record.begin_merge(), Ok(1), "again, after a death");
        record.drop_layer(1);
        assert_eq!((record.chain().len(), record.dropped().len()), (1, 1));
        assert_eq!(record.forget_dropped(), []);
        record.unpin(&pin(2));
        assert_eq!(record.forget_dropped().len(), 1);
        assert_eq!(record.layers.len(), 1);
    }

    #[test]
    fn the_only_layer_is_merged_where_nobody_serves_the_disk() {
        let mut record = Record::new(Id([1; 16]), NOBODY);
        assert_eq!(record.foldable(), Err(Refused::Nothing));
        record.open(layer(0, State::Opened), CHAIN_MAX).unwrap();
        assert_eq!(record.foldable(), Err(Refused::Busy));
        record.seal(1, true);
        let pin = Pin { snapshot: 1, reader: reader("b") };
        record.pin(pin.clone()).unwrap();
        assert!(matches!(record.begin_fold(), Err(Refused::Pinned { layer: 1, .. })));
        record.unpin(&pin);
        assert_eq!(record.begin_fold(), Ok(1));
        assert_eq!(record.pin(pin), Err(Refused::Missing(1)), "the image is changed below it");
        assert_eq!(record.begin_fold(), Ok(1), "again, after a death");
        // Or the disk is served again: what was begun goes on with the next merge.
        let mut served = record.clone();
        assert_eq!(served.mergeable(), Err(Refused::Nothing));
        served.open(layer(0, State::Opened), CHAIN_MAX).unwrap();
        served.seal(2, true);
        assert_eq!(served.begin_merge(), Ok(1));
        record.drop_layer(1);
        assert_eq!((record.chain().len(), record.forget_dropped().len()), (0, 1));
    }

    #[test]
    fn a_layer_without_blocks_is_taken_back_and_no_other() {
        let mut record = Record::new(Id([1; 16]), NOBODY);
        for id in [1, 2] {
            record.open(layer(0, State::Opened), CHAIN_MAX).unwrap();
            record.seal(id, true);
        }
        assert_eq!(record.take_back(1), Err(Refused::Missing(1)), "it is not the highest");
        let pin = Pin { snapshot: 2, reader: reader("b") };
        record.pin(pin.clone()).unwrap();
        assert!(matches!(record.take_back(2), Err(Refused::Pinned { layer: 2, .. })));
        record.unpin(&pin);
        assert_eq!(record.take_back(2), Ok(()));
        assert_eq!(record.open(layer(0, State::Opened), CHAIN_MAX), Ok(3), "no number comes twice");
        assert_eq!(record.take_back(3), Ok(()));
        assert_eq!(record.take_back(3), Err(Refused::Missing(3)));
        assert_eq!(record.begin_fold(), Ok(1));
        assert_eq!(record.take_back(1), Err(Refused::Missing(1)), "it has blocks of the image");
    }

    #[test]
    fn what_cannot_go_down_goes_up_if_nobody_wants_what_lies_between() {
        let mut record = Record::new(Id([1; 16]), NOBODY);
        for (id, told) in [(1, true), (2, false), (3, false)] {
            record.open(layer(0, State::Opened), LAYERS_MAX).unwrap();
            record.seal(id, told);
        }
        // The lowest snapshot is wanted, so nothing goes down; nobody is told of the other two.
        assert_eq!(record.liftable(), Ok(2));
        let pin = Pin { snapshot: 1, reader: reader("b") };
        record.pin(pin).unwrap();
        assert_eq!(record.liftable(), Ok(2), "a reader of the image alone has no part of it");
        let late = Pin { snapshot: 3, reader: reader("c") };
        assert_eq!(record.pin(late.clone()), Err(Refused::Missing(3)), "it may change");
        record.pins.push(late.clone());
        assert!(matches!(record.lift(), Err(Refused::Pinned { layer: 2, snapshot: 3, .. })));
        record.unpin(&late);
        assert_eq!(record.lift(), Ok(2));
        let ids: Vec<_> = record.chain().iter().map(|layer| layer.id).collect();
        assert_eq!(ids, [1, 3]);
        assert_eq!(record.liftable(), Err(Refused::Nothing));
        // A snapshot that somebody wants keeps the two apart.
        record.open(layer(0, State::Opened), CHAIN_MAX).unwrap();
        record.seal(4, true);
        assert_eq!(record.liftable(), Err(Refused::Nothing));
        record.lapse(4).unwrap();
        assert_eq!(record.liftable(), Ok(3));
    }

    #[test]
    fn chains_are_short() {
        let mut record = Record::new(Id([1; 16]), NOBODY);
        for id in 1..=CHAIN_MAX as u64 {
            assert_eq!(record.open(layer(0, State::Opened), CHAIN_MAX), Ok(id));
            record.seal(id, true);
        }
        assert_eq!(record.open(layer(0, State::Opened), CHAIN_MAX), Err(Refused::Full(CHAIN_MAX)));
    }

    proptest! {
        #[test]
        fn a_slot_with_any_wrong_byte_is_no_record(place in 0..SLOT_BYTES, change in 1u8..) {
            let mut slot = held().encode();
            slot[place] ^= change;
            prop_assert_eq!(Record::decode(&slot), Ok(None));
        }
    }
}
