//! Whoever may write beside an image: the record of its layers, and their maps.

use semper_epoch::{Claim, Holder, Id};
use semper_layers::bits::{Bits, CHUNK_BYTES, Have, Identity, Kind};
use semper_layers::record::{
    CHAIN_MAX, FILE_BYTES, Layer, NOBODY, Pin, Record, SLOT_BYTES, State, newest,
};

use crate::bytes::Bytes;

/// What is read is what was written; a file with a torn slot still says what the other one does; and
/// whatever the bits of a map are, no block lies beyond the end of the disk.
pub fn layers(data: &[u8]) {
    judge(data);
    let mut bytes = Bytes(data);
    let mut record = some_record(&mut bytes);
    record.sequence = u64::from(bytes.u8()) + 1;
    let slot = record.encode();
    assert_eq!(Record::decode(&slot), Ok(Some(record.clone())), "not read as written");
    let (mut torn, mut older) = (slot, record.clone());
    let cut = usize::from(bytes.u16()) % SLOT_BYTES;
    torn[cut..].fill(0);
    older.sequence -= 1;
    let mut file = [older.encode(), slot].concat();
    assert_eq!(newest(&file), Ok(Some(record.clone())), "not the newest");
    if torn != slot {
        assert_eq!(newest(&[slot, torn].concat()), Ok(Some(record)), "a torn slot counts");
    }
    for (place, byte) in file.iter_mut().zip(bytes.take(data.len())) {
        *place ^= byte;
    }
    judge(&file);
    map(data);
}

/// What commands in any order make.
fn some_record(bytes: &mut Bytes) -> Record {
    let writer = Claim { epoch: bytes.u64(), id: Id([bytes.u8(); 16]) };
    let mut record = Record::new(Id([bytes.u8(); 16]), writer);
    let (state, size, time) = (State::Opened, bytes.u64(), bytes.u64());
    for _ in 0..bytes.u8() % 32 {
        let id = u64::from(bytes.u8() % 16);
        let reader = Holder::new(&"r".repeat(usize::from(bytes.u8() % 40) + 1)).unwrap_or_default();
        let pin = Pin { snapshot: id, reader };
        let frozen = bytes.u8() & 1 == 1;
        match bytes.u8() % 9 {
            0 => drop(record.open(Layer { id, writer, size, time, state, frozen }, CHAIN_MAX)),
            1 => record.seal(id, frozen),
            2 => drop(record.lapse(id)),
            3 => drop(record.begin_merge()),
            4 => record.drop_layer(id),
            5 => drop(record.forget_dropped()),
            6 => drop(record.pin(pin)),
            7 => drop(record.lift()),
            _ => drop(record.unpin(&pin)),
        }
    }
    record
}

fn judge(content: &[u8]) {
    let Ok(Some(record)) = newest(content) else { return };
    assert!(content.len().min(FILE_BYTES) >= SLOT_BYTES, "from less than a slot");
    assert_eq!(Record::decode(&record.encode()), Ok(Some(record.clone())), "not kept as it is");
    if let Ok(layer) = record.mergeable() {
        assert!(record.pins.iter().all(|pin| pin.snapshot > layer), "a pin is merged");
    }
}

fn map(data: &[u8]) {
    let _ = Identity::decode(data, Kind::Map);
    let mut bytes = Bytes(data);
    let size = u64::from(bytes.u16()) * 512 + 1;
    let identity = Identity { chain: Id([1; 16]), layer: 1, writer: NOBODY, size };
    let Ok(bits) = Bits::anonymous(&identity) else { return };
    let mut chunk = [0; CHUNK_BYTES];
    chunk.iter_mut().zip(data).for_each(|(into, byte)| *into = *byte);
    if bits.load(0, &chunk).is_err() {
        return;
    }
    let mut at = 0;
    while let Some((first, have, count)) = bits.next(at, 64) {
        assert!(first >= at && count > 0 && first + count <= bits.blocks(), "beyond the end");
        assert_ne!(have, Have::Absent);
        at = first + count;
    }
    assert_eq!(bits.get(bits.blocks() + u64::from(bytes.u16()) * 4096 * 4), Have::Absent);
}
