//! Direct I/O to parts of the storage's blocks: what is beside them is kept.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Barrier;

use semper_block::{
    Absorbed, Engine, Image, ImageError, Io, Op, OpenOptions, Prepared, Submission, SyncEngine,
    Unit,
};
use semper_testbed::LoopDevice;

const BLOCK: usize = 4096;
const DIRECT: OpenOptions = OpenOptions { read_only: false, direct: true, block_size: None };

struct Stage {
    file: tempfile::NamedTempFile,
    _device: LoopDevice,
    image: Image,
}

impl Stage {
    fn new() -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![0x77; 64 * BLOCK]).unwrap();
        let device = LoopDevice::new(file.path(), BLOCK as u32);
        let image = Image::open(&device.node, DIRECT).unwrap();
        assert_eq!((image.transfer_alignment(), image.block_size()), (BLOCK as u32, 512));
        Self { file, _device: device, image }
    }

    fn content(&self) -> Vec<u8> {
        // Around the cache: what the device has.
        let flushed = File::open(self.image.path()).and_then(|device| device.sync_all());
        flushed.unwrap();
        std::fs::read(self.file.path()).unwrap()
    }
}

/// Carries out a request of one segment; `each` is called after each of its system calls.
fn carry_out(image: &Image, op: Op, offset: usize, bytes: &mut [u8], mut each: impl FnMut()) {
    let mut engine = SyncEngine::new(image.fd()).unwrap();
    let mut io = Io::default();
    io.reset(op);
    (io.offset, io.len) = (offset as u64, bytes.len() as u64);
    io.iov.push(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() });
    assert_eq!(io.prepare(image, false), Prepared::Ready);
    loop {
        // SAFETY: request and buffer stay where they are; the engine is synchronous.
        let Submission::Done(result) = (unsafe { engine.submit(0, &io) }) else { panic!("queued") };
        let outcome = io.absorb(result, image);
        each();
        match outcome {
            Absorbed::More => {}
            Absorbed::Finished => return,
            Absorbed::Failed(errno) => panic!("errno {errno}"),
        }
    }
}

const WRITE: Op = Op::Write { stable: false };

#[test]
fn every_range_of_sectors_within_some_blocks_is_read_and_written_alone() {
    let stage = Stage::new();
    let mut expected = vec![0x77; 64 * BLOCK];
    let mut value = 0u8;
    for first in 0..20usize {
        for count in 1..=(24 - first) {
            value = value.wrapping_add(1);
            let (at, len) = (first * 512, count * 512);
            carry_out(&stage.image, WRITE, at, &mut vec![value; len], || {});
            expected[at..at + len].fill(value);
            let mut back = vec![0; len + 512];
            carry_out(&stage.image, Op::Read, at, &mut back, || {});
            assert!(back == expected[at..at + len + 512], "{first} {count}");
        }
    }
    assert!(stage.content() == expected);
}

/// Two writes of different sectors of one block, in the order that loses one unless they are kept
/// apart: both have read the block before one of them writes it.
#[test]
fn the_second_write_to_a_block_waits_and_without_that_one_is_lost() {
    let (first, second) = ((512, 512), (1024, 512));
    let stage = Stage::new();
    assert!(stage.image.try_enter(WRITE, first.0, first.1));
    assert!(!stage.image.try_enter(WRITE, second.0, second.1), "both at once");
    assert!(stage.image.try_enter(Op::Read, second.0, second.1), "a read harms nobody");
    stage.image.leave(WRITE, first.0, first.1);
    assert!(stage.image.try_enter(WRITE, second.0, second.1));
    // The control: nobody asks.
    let both = Barrier::new(2);
    std::thread::scope(|scope| {
        for (offset, _) in [first, second] {
            let (image, both) = (&stage.image, &both);
            scope.spawn(move || {
                let mut met = false;
                carry_out(image, WRITE, offset as usize, &mut [1; 512], || {
                    if !std::mem::replace(&mut met, true) {
                        both.wait();
                    }
                });
            });
        }
    });
    let content = stage.content();
    let kept = [first, second].iter().filter(|(at, _)| content[*at as usize] == 1).count();
    assert_eq!(kept, 1, "nothing was lost, so this test could not fail");
}

#[test]
fn an_image_that_direct_io_does_not_suit_is_refused_with_its_size() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(64 << 20).unwrap();
    let device = LoopDevice::new(file.path(), BLOCK as u32);
    let made = std::process::Command::new("mkfs.ext4").arg("-q").arg(&device.node).status();
    assert!(made.expect("mkfs.ext4").success());
    let dir = tempfile::tempdir().unwrap();
    let mounted = std::process::Command::new("mount").arg(&device.node).arg(dir.path()).status();
    assert!(mounted.expect("mount").success(), "not mounted: run as root");
    let path = dir.path().join("disk.raw");
    let image = File::create(&path).unwrap();
    let opened = [(8192 + 512, false), (8192, true), (8192 + 512, true)].map(|(size, direct)| {
        image.set_len(size).unwrap();
        image.write_all_at(&[5; 512], size - 512).unwrap();
        Image::open(&path, OpenOptions { direct, ..DIRECT }).map(|image| image.block_size())
    });
    let status = std::process::Command::new("umount").arg("--lazy").arg(dir.path()).status();
    assert!(status.unwrap().success());
    let [cached, direct, refused] = opened;
    assert_eq!((cached.unwrap(), direct.unwrap()), (512, 512));
    let refused = refused.unwrap_err();
    assert!(
        matches!(refused, ImageError::Size { size: 8704, block: 4096, unit: Unit::Storage, .. }),
        "{refused}"
    );
    let words = "does direct I/O; make it larger (truncate --size=12288), or serve it without";
    assert!(refused.to_string().contains(words), "{refused}");
}
