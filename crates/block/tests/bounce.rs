//! Buffers that stand in for unaligned ones of a guest: right bytes, bounded memory.

use std::fs::File;

use semper_block::{
    Absorbed, Engine, Image, Io, Op, OpenOptions, Prepared, Submission, SyncEngine,
};

/// An image that is opened around the page cache, or none where the file system cannot.
fn direct_image(len: u64) -> Option<(tempfile::TempDir, Image)> {
    // Not in /tmp, which may be a tmpfs.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("disk.raw");
    File::create(&path).unwrap().set_len(len).unwrap();
    let options = OpenOptions { direct: true, ..OpenOptions::default() };
    let image = Image::open(&path, options).ok().filter(|image| image.memory_alignment() > 1);
    if image.is_none() {
        eprintln!("no direct I/O with alignment here; nothing to test");
    }
    image.map(|image| (dir, image))
}

fn segment(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

fn request(op: Op, offset: u64, segments: Vec<libc::iovec>) -> Io {
    let mut io = Io::default();
    io.reset(op);
    io.offset = offset;
    io.len = segments.iter().map(|s| s.iov_len as u64).sum();
    io.iov = segments;
    io
}

fn carry_out(engine: &mut SyncEngine, image: &Image, mut io: Io) {
    assert_eq!(io.prepare(image, false), Prepared::Ready);
    loop {
        // SAFETY: the segments' memory outlives this call, which is synchronous.
        let Submission::Done(result) = (unsafe { engine.submit(0, &io) }) else { panic!("queued") };
        match io.absorb(result, image) {
            Absorbed::More => {}
            Absorbed::Finished => return,
            Absorbed::Failed(errno) => panic!("errno {errno}"),
        }
    }
}

#[test]
fn unaligned_buffers_carry_the_right_bytes() {
    let Some((_dir, image)) = direct_image(1 << 20) else { return };
    let mut engine = SyncEngine::new(image.fd()).unwrap();
    let pattern: Vec<u8> = (0..8192u32).map(|i| (i * 31 % 251) as u8).collect();
    // Three pieces, none of them aligned.
    let mut memory = vec![0; 3 * 8192 + 3];
    for cuts in [[1, 8191], [511, 513], [4000, 4096]] {
        let mut pieces = Vec::new();
        let bounds = [0, cuts[0], cuts[1], pattern.len()];
        for (n, range) in bounds.windows(2).enumerate() {
            let start = n * 8192 + 1 + n;
            let piece = &mut memory[start..start + range[1] - range[0]];
            piece.copy_from_slice(&pattern[range[0]..range[1]]);
            pieces.push(segment(piece));
        }
        carry_out(&mut engine, &image, request(Op::Write { stable: false }, 4096, pieces.clone()));
        memory.fill(0);
        carry_out(&mut engine, &image, request(Op::Read, 4096, pieces));
        let read: Vec<u8> = bounds
            .windows(2)
            .enumerate()
            .flat_map(|(n, range)| memory[n * 8192 + 1 + n..][..range[1] - range[0]].to_vec())
            .collect();
        assert!(read == pattern, "cut at {cuts:?}");
    }
}

/// A guest can name the same few bytes in every descriptor of every request.
#[test]
fn a_guest_cannot_make_the_host_allocate_without_end() {
    let Some((_dir, image)) = direct_image(1 << 30) else { return };
    let mut bytes = vec![0; (64 << 10) + 1];
    let unaligned = segment(&mut bytes[1..]);
    let one_more = |image: &Image| request(Op::Read, 0, vec![unaligned; 128]).prepare(image, false);
    let mut requests = Vec::new();
    loop {
        let mut io = request(Op::Read, 0, vec![unaligned; 128]);
        if io.prepare(&image, false) != Prepared::Ready {
            break;
        }
        requests.push(io);
        assert!(requests.len() * (8 << 20) <= 1 << 30, "a gigabyte for one small buffer");
    }
    assert!(requests.len() >= 16, "a few large unaligned requests must work");
    // What one gives back, another can have.
    requests.pop();
    assert_eq!(one_more(&image), Prepared::Ready);
    requests.clear();
    // Nor does one that failed keep anything, while it waits to be used again.
    for _ in 0..64 {
        let mut io = request(Op::Write { stable: false }, 0, vec![unaligned; 128]);
        assert_eq!(io.prepare(&image, false), Prepared::Ready);
        assert_eq!(io.absorb(-libc::EIO, &image), Absorbed::Failed(libc::EIO));
        requests.push(io);
    }
    assert_eq!(one_more(&image), Prepared::Ready);
}
