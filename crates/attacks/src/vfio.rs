//! A client of the vfio-user server, which may be a QEMU that its guest has taken over; and who
//! writes to the control socket.

use std::cell::RefCell;

use semper_vfiod::hostile::Target;
use tempfile::NamedTempFile;

use crate::bytes::Bytes;

thread_local!(static IMAGE: RefCell<Option<NamedTempFile>> = const { RefCell::new(None) });

/// Messages that `data` describes, sensible ones and others, and lines of the control socket.
pub fn vfio(data: &[u8]) {
    IMAGE.with_borrow_mut(|image| {
        let image = image.get_or_insert_with(|| {
            let image = NamedTempFile::new().expect("a file for the image");
            image.as_file().set_len(1 << 20).expect("room for the image");
            image
        });
        let mut bytes = Bytes(data);
        let shape = bytes.u8();
        let path = (shape & 1 == 0).then(|| image.path());
        let mut target = Target::new(path, shape & 2 != 0);
        if shape & 4 != 0 {
            target.be_followed();
        }
        for _ in 0..100 {
            if bytes.is_empty() {
                return;
            }
            step(&mut target, &mut bytes);
        }
    });
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn access(offset: u64, region: u32, data: &[u8]) -> Vec<u8> {
    let len = (data.len() as u32).to_le_bytes();
    [&offset.to_le_bytes()[..], &region.to_le_bytes(), &len, data].concat()
}

fn step(target: &mut Target, bytes: &mut Bytes<'_>) {
    let shim = bytes.u8() % 8 == 0;
    match bytes.u8() % 11 {
        // What a spare is told.
        10 => {
            let (kind, port, command) = (bytes.u8() % 7, bytes.u8() % 3, bytes.u8() % 14);
            let len = usize::from(bytes.u8());
            let mut packet = b"SVLK\x01\0".to_vec();
            packet.extend([kind, 0, port, 0, command, 0]);
            packet.extend(bytes.take(len));
            target.packet(&packet, usize::from(bytes.u8() % 7));
        }
        // A range of memory, of some sense.
        0 => {
            let mut body = words(&[32, u32::from(bytes.u8() % 4)]);
            let page = |bytes: &mut Bytes<'_>| u64::from(bytes.u8() % 80) << 12;
            for long in [page(bytes), page(bytes), page(bytes)] {
                body.extend(long.to_le_bytes());
            }
            target.message(shim, 2, 0, body, true);
        }
        1 => {
            let mut body = words(&[24, u32::from(bytes.u8() % 4)]);
            body.extend((u64::from(bytes.u8()) << 12).to_le_bytes());
            body.extend(bytes.u32().to_le_bytes());
            body.extend([0; 4]);
            target.message(shim, 3, 0, body, false);
        }
        2 => {
            let value = bytes.u32().to_le_bytes();
            let offset = [4, 0x10, 0x14, 0x3c, 0x42, 0x88][usize::from(bytes.u8() % 6)];
            target.message(shim, 10, 0, access(offset, 7, &value), false);
        }
        3 => {
            let offset = u64::from(bytes.u16() % 0x4100);
            let data = bytes.u64().to_le_bytes();
            let len = usize::from(bytes.u8() % 9);
            target.message(shim, 10, 0, access(offset, 0, &data[..len]), false);
        }
        // What a driver begins with: bus master, queues, enable.
        4 => {
            target.message(false, 10, 0, access(4, 7, &[6, 0]), false);
            for (offset, value) in [(0x24, 0x000f_000fu64), (0x28, 0x1000), (0x30, 0x2000)] {
                let data = value.to_le_bytes();
                let len = if offset == 0x24 { 4 } else { 8 };
                target.message(false, 10, 0, access(offset, 0, &data[..len]), false);
            }
            target.message(false, 10, 0, access(0x14, 0, &0x0046_0001u32.to_le_bytes()), false);
        }
        5 => {
            let body = words(&[
                20,
                u32::from(bytes.u8()),
                u32::from(bytes.u8() % 6),
                u32::from(bytes.u8()),
                bytes.u32() % 5,
            ]);
            target.message(shim, 8, 0, body, bytes.u8() % 2 == 0);
        }
        6 => {
            let command = usize::from(bytes.u8()) % LINES.len();
            target.line(LINES[command]);
        }
        7 => {
            let text = String::from_utf8_lossy(bytes.take(40)).into_owned();
            target.line(&text);
        }
        _ => {
            let (command, flags) = (u16::from(bytes.u8() % 20), u32::from(bytes.u8()) & !0xf);
            let len = usize::from(bytes.u8());
            target.message(shim, command, flags, bytes.take(len).to_vec(), bytes.u8() % 2 == 0);
        }
    }
}

const LINES: [&str; 15] = [
    r#"{"cmd":"status"}"#,
    r#"{"cmd":"configuration"}"#,
    r#"{"cmd":"msix","address":4273942528,"table":"00"}"#,
    r#"{"cmd":"capture","on":true}"#,
    r#"{"cmd":"capture","on":true,"dirty":"touch"}"#,
    r#"{"cmd":"capture","on":false}"#,
    r#"{"cmd":"round"}"#,
    r#"{"cmd":"replay","writes":"[{\"offset\":4104,\"size\":4,\"value\":3}]"}"#,
    r#"{"cmd":"quiesce"}"#,
    r#"{"cmd":"touch"}"#,
    r#"{"cmd":"export"}"#,
    r#"{"cmd":"import","state":"{}"}"#,
    r#"{"cmd":"release"}"#,
    r#"{"cmd":"claim","epoch":1,"claim":"5f0c9a417e2b4d3c8f6a1b0e92d7c4f8"}"#,
    r#"{"cmd":"resume"}"#,
];
