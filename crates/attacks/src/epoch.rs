//! Whoever may write beside an image, and a host that died while it did.

use semper_epoch::record::{FILE_BYTES, SLOT_BYTES, newest};
use semper_epoch::{Admission, Claim, Holder, Id, Record};

use crate::bytes::Bytes;

/// What is read is what was written; a file with a torn slot still says what the other one does.
pub fn epoch(data: &[u8]) {
    judge(data);
    let mut bytes = Bytes(data);
    let record = Record {
        image: Id([bytes.u8(); 16]),
        sequence: u64::from(bytes.u8()) + 1,
        epoch: bytes.u64(),
        claim: Id([bytes.u8(); 16]),
        holder: Holder::new(&"h".repeat(usize::from(bytes.u8()) + 1)).unwrap_or_default(),
        released: bytes.u8() & 1 == 1,
        layered: bytes.u8() & 1 == 1,
    };
    let slot = record.encode();
    assert_eq!(Record::decode(&slot), Ok(Some(record.clone())), "not read as written");
    let (mut torn, mut older) = (slot, record.clone());
    let cut = usize::from(bytes.u16()) % SLOT_BYTES;
    torn[cut..].fill(0);
    older.sequence -= 1;
    for file in [[older.encode(), slot], [slot, older.encode()]] {
        assert_eq!(newest(&file.concat()), Ok(Some(record.clone())), "not the newest");
    }
    if torn != slot {
        for file in [[torn, slot], [slot, torn]] {
            assert_eq!(newest(&file.concat()), Ok(Some(record.clone())), "a torn slot counts");
        }
    }
    let mut changed = [slot, torn].concat();
    for (place, byte) in changed.iter_mut().zip(bytes.take(data.len())) {
        *place ^= byte;
    }
    judge(&changed);
}

fn judge(content: &[u8]) {
    let Ok(Some(record)) = newest(content) else { return };
    assert!(content.len().min(FILE_BYTES) >= SLOT_BYTES, "from less than a slot");
    assert_eq!(Record::decode(&record.encode()), Ok(Some(record.clone())), "not kept as it is");
    let claim = Claim { epoch: record.epoch, id: record.claim };
    assert_ne!(record.admit(claim), Admission::Stale, "the claim on record");
}
