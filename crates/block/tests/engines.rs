//! The contract of [`Engine`], held by every engine and by the decorator around it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use semper_block::{
    Absorbed, Engine, FaultEngine, FaultRule, FaultSwitch, Image, Io, NowaitEngine, NullEngine, Op,
    OpenOptions, Submission, SyncEngine, UringEngine,
};

const LEN: usize = 1 << 20;
const WRITE: Op = Op::Write { stable: false };

struct Stage {
    _dir: tempfile::TempDir,
    image: Image,
}

impl Stage {
    fn new() -> Self {
        Self::within(tempfile::tempdir().unwrap())
    }

    fn within(dir: tempfile::TempDir) -> Self {
        let path = dir.path().join("disk.raw");
        std::fs::write(&path, (0..LEN).map(|i| (i / 512) as u8).collect::<Vec<_>>()).unwrap();
        let image = Image::open(&path, OpenOptions::default()).unwrap();
        Self { _dir: dir, image }
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(self.image.path()).unwrap()
    }
}

fn request(op: Op, offset: u64, buffer: &mut [u8]) -> Io {
    let mut io = Io::default();
    io.reset(op);
    io.offset = offset;
    io.len = buffer.len() as u64;
    io.iov.push(libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() });
    io
}

fn range(op: Op, offset: u64, len: u64) -> Io {
    let mut io = Io::default();
    io.reset(op);
    (io.offset, io.len) = (offset, len);
    io
}

/// Carries out all requests side by side; gives what became of each.
fn carry_out<E: Engine>(engine: &mut E, image: &Image, mut requests: Vec<Io>) -> Vec<Absorbed> {
    let mut outcomes = BTreeMap::new();
    let mut ready: Vec<(u64, i32)> = Vec::new();
    let submit = |engine: &mut E, token: u64, io: &Io, ready: &mut Vec<(u64, i32)>| {
        // SAFETY: requests and buffers stay where they are until everything was reaped.
        if let Submission::Done(result) = unsafe { engine.submit(token, io) } {
            ready.push((token, result));
        }
    };
    for (token, io) in requests.iter().enumerate() {
        submit(engine, token as u64, io, &mut ready);
    }
    let end = Instant::now() + Duration::from_secs(90);
    while outcomes.len() < requests.len() {
        assert!(Instant::now() < end, "{} of {} are back", outcomes.len(), requests.len());
        engine.flush().unwrap();
        engine.reap(&mut ready);
        for (token, result) in std::mem::take(&mut ready) {
            let io = &mut requests[token as usize];
            match io.absorb(result, image) {
                Absorbed::More => submit(engine, token, io, &mut ready),
                outcome => assert!(outcomes.insert(token, outcome).is_none(), "{token} twice"),
            }
        }
    }
    assert_eq!(engine.in_flight(), 0);
    outcomes.into_values().collect()
}

fn holds_the_contract<E: Engine>(make: impl Fn(&Image) -> E) {
    for stage in [Stage::new, on_tmpfs] {
        every_operation(stage(), &make);
        more_requests_than_fit(stage(), &make);
        end_of_file(stage(), &make);
    }
    wakers(&make);
}

fn on_tmpfs() -> Stage {
    let stage = Stage::within(tempfile::tempdir_in("/dev/shm").unwrap());
    assert!(stage.image.on_tmpfs());
    stage
}

fn every_operation<E: Engine>(stage: Stage, make: impl Fn(&Image) -> E) {
    let mut engine = make(&stage.image);
    let (mut read, mut written, mut stable) = ([0; 1024], [0xaa; 1024], [0xbb; 512]);
    let requests = vec![
        request(Op::Read, 512, &mut read),
        request(WRITE, 8192, &mut written),
        request(Op::Write { stable: true }, 16384, &mut stable),
        range(Op::Flush, 0, 0),
        range(Op::WriteZeroes { unmap: false }, 32768, 4096),
        range(Op::WriteZeroes { unmap: true }, 65536, 4096),
        range(Op::Discard, 131_072, 4096),
    ];
    let outcomes = carry_out(&mut engine, &stage.image, requests);
    assert!(outcomes.iter().all(|outcome| *outcome == Absorbed::Finished), "{outcomes:?}");
    assert_eq!((read[0], read[511], read[512]), (1, 1, 2));
    let content = stage.content();
    assert_eq!(content.len(), LEN);
    assert!(content[8192..9216] == written && content[16384..16896] == stable);
    for zeroed in [32768, 65536, 131_072] {
        assert!(content[zeroed..zeroed + 4096].iter().all(|byte| *byte == 0), "{zeroed}");
        assert_ne!(content[zeroed + 4096], 0);
    }
}

fn more_requests_than_fit<E: Engine>(stage: Stage, make: impl Fn(&Image) -> E) {
    let mut engine = make(&stage.image);
    let mut buffers = vec![[0u8; 512]; 2000];
    let requests: Vec<Io> = buffers
        .iter_mut()
        .enumerate()
        .map(|(n, buffer)| request(Op::Read, n as u64 * 512, buffer))
        .collect();
    let outcomes = carry_out(&mut engine, &stage.image, requests);
    assert!(outcomes.iter().all(|outcome| *outcome == Absorbed::Finished));
    assert!(buffers.iter().enumerate().all(|(n, buffer)| *buffer == [n as u8; 512]));
}

fn end_of_file<E: Engine>(stage: Stage, make: impl Fn(&Image) -> E) {
    let mut engine = make(&stage.image);
    let file = File::options().write(true).open(stage.image.path()).unwrap();
    file.set_len(LEN as u64 / 2).unwrap();
    let (mut beyond, mut across) = ([1; 4096], [1; 4096]);
    let requests = vec![
        request(Op::Read, LEN as u64 - 4096, &mut beyond),
        request(Op::Read, LEN as u64 / 2 - 512, &mut across),
    ];
    let outcomes = carry_out(&mut engine, &stage.image, requests);
    assert_eq!(outcomes, [Absorbed::Failed(libc::EIO); 2]);
}

/// Each write to an eventfd wakes, although nobody reads it; none after it was taken out.
fn wakers<E: Engine>(make: impl Fn(&Image) -> E) {
    let stage = Stage::new();
    let mut engine = make(&stage.image);
    // SAFETY: new descriptors, checked and then owned.
    let [first, second] = [(); 2].map(|()| unsafe {
        let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    });
    engine.add_waker(first.as_raw_fd()).unwrap();
    engine.add_waker(second.as_raw_fd()).unwrap();
    let kick = |mut waker: &File| waker.write_all(&1u64.to_ne_bytes()).unwrap();
    for round in 0..300 {
        // More rounds than one multishot poll would survive, on both.
        kick(if round % 2 == 0 { &first } else { &second });
        engine.wait().unwrap();
        let mut none = Vec::new();
        engine.reap(&mut none);
        assert!(none.is_empty());
    }
    engine.remove_waker(first.as_raw_fd());
    let waited = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            kick(&first);
            // Whatever the first one does, only the second ends the wait below for sure.
            waited.store(true, Ordering::Release);
            kick(&second);
        });
        while !waited.load(Ordering::Acquire) {
            engine.wait().unwrap();
            engine.reap(&mut Vec::new());
        }
    });
    engine.remove_waker(second.as_raw_fd());
}

#[test]
fn the_sync_engine_holds_the_contract() {
    holds_the_contract(|image| SyncEngine::new(image.fd()).unwrap());
}

#[test]
fn the_uring_engine_holds_the_contract() {
    holds_the_contract(|image| UringEngine::new(image.fd()).unwrap());
}

#[test]
fn the_nowait_engine_holds_the_contract() {
    holds_the_contract(|image| NowaitEngine::new(image.fd()).unwrap());
}

/// What is not in the page cache is read beside what is, and overtaken by it.
#[test]
fn the_nowait_engine_does_not_wait_for_the_medium() {
    let stage = Stage::within(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
    assert!(!stage.image.on_tmpfs(), "this test needs a directory on a disk");
    stage.image.file().sync_all().unwrap();
    // SAFETY: no memory is passed.
    let dropped = unsafe { libc::posix_fadvise(stage.image.fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(dropped, 0);
    let mut engine = NowaitEngine::new(stage.image.fd()).unwrap();
    let (mut missing, mut written) = ([0; 4096], [5; 4096]);
    let far = request(Op::Read, 512 << 10, &mut missing);
    // SAFETY: requests and buffers stay where they are until everything was reaped; so below.
    let miss = unsafe { engine.submit(0, &far) };
    assert_eq!(miss, Submission::Queued, "a read that has to wait was done in the queue's thread");
    let write = request(WRITE, 0, &mut written);
    // SAFETY: see above.
    assert_eq!(unsafe { engine.submit(1, &write) }, Submission::Done(4096));
    let mut done = Vec::new();
    while done.is_empty() {
        engine.flush().unwrap();
        engine.reap(&mut done);
    }
    assert_eq!(done, [(0, 4096)]);
    let hit = request(Op::Read, 512 << 10, &mut missing);
    // SAFETY: see above.
    assert_eq!(unsafe { engine.submit(2, &hit) }, Submission::Done(4096));
    assert_eq!(missing[0], (1024 % 256) as u8);
}

#[cfg(target_arch = "x86_64")]
mod mapped {
    use std::cell::Cell;
    use std::io;
    use std::os::fd::RawFd;
    use std::os::unix::fs::MetadataExt;
    use std::rc::Rc;

    use semper_block::{MappedEngine, Mapping};

    use super::*;

    const PIECE: u64 = 2 << 20;

    /// Counts the requests that are not copied.
    struct Counted<E>(E, Rc<Cell<u64>>);

    impl<E: Engine> Engine for Counted<E> {
        const CONCURRENT: bool = E::CONCURRENT;

        unsafe fn submit(&mut self, token: u64, io: &Io) -> Submission {
            self.1.set(self.1.get() + 1);
            // SAFETY: the caller's promise, handed on.
            unsafe { self.0.submit(token, io) }
        }

        fn flush(&mut self) -> io::Result<()> {
            self.0.flush()
        }

        fn reap(&mut self, into: &mut Vec<(u64, i32)>) {
            self.0.reap(into);
        }

        fn in_flight(&self) -> usize {
            self.0.in_flight()
        }

        fn add_waker(&mut self, fd: RawFd) -> io::Result<()> {
            self.0.add_waker(fd)
        }

        fn remove_waker(&mut self, fd: RawFd) {
            self.0.remove_waker(fd);
        }

        fn wait(&mut self) -> io::Result<()> {
            self.0.wait()
        }
    }

    /// An engine that knows nothing yet: what a backend has when it starts.
    fn mapped(image: &Image) -> MappedEngine<SyncEngine> {
        MappedEngine::new(Mapping::new(image).unwrap(), SyncEngine::new(image.fd()).unwrap())
    }

    /// An engine that has found out which pages of an image without holes are in memory.
    fn warmed<E: Engine>(image: &Image, rest: E) -> MappedEngine<Counted<E>> {
        let passed = Rc::new(Cell::new(0));
        let counted = Counted(rest, Rc::clone(&passed));
        let mut engine = MappedEngine::new(Mapping::new(image).unwrap(), counted);
        let end = Instant::now() + Duration::from_secs(90);
        loop {
            passed.set(0);
            for offset in (0..image.file_size()).step_by(PIECE as usize) {
                carry_out(&mut engine, image, vec![request(Op::Read, offset, &mut [0; 512])]);
            }
            if passed.get() == 0 {
                return engine;
            }
            assert!(Instant::now() < end, "{} requests are still not copied", passed.get());
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_mapped_engine_holds_the_contract() {
        holds_the_contract(mapped);
        holds_the_contract(|image| warmed(image, SyncEngine::new(image.fd()).unwrap()));
        holds_the_contract(|image| warmed(image, NowaitEngine::new(image.fd()).unwrap()));
    }

    /// An image of `pieces` times 2 MiB on tmpfs, filled or one hole.
    fn large(dir: &tempfile::TempDir, pieces: u64, filled: bool) -> Image {
        let path = dir.path().join("large.raw");
        let mut file = File::create(&path).unwrap();
        if filled {
            (0..pieces).for_each(|_| file.write_all(&[1; PIECE as usize]).unwrap());
        }
        file.set_len(pieces * PIECE).unwrap();
        Image::open(&path, OpenOptions::default()).unwrap()
    }

    /// Processor time of this thread for a read of 4 KiB in each of so many pieces: no neighbour on
    /// the machine is in it, and no other thread.
    fn touch_each<E: Engine>(engine: &mut E, image: &Image, pieces: u64) -> Duration {
        let mut buffer = [0; 4096];
        let used = || {
            let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: the call fills the structure; the clock always exists.
            unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
            Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
        };
        let step = image.file_size() / PIECE / pieces;
        let before = used();
        for piece in 0..pieces {
            let io = request(Op::Read, piece * step * PIECE, &mut buffer);
            // SAFETY: request and buffer live until it is done; the engine is synchronous.
            let outcome = unsafe { engine.submit(0, &io) };
            assert_eq!(outcome, Submission::Done(4096));
        }
        used() - before
    }

    /// What must not be: a request that finds out about its whole piece, or puts it in place.
    struct Thorough {
        rest: SyncEngine,
        base: *mut u8,
    }

    impl Thorough {
        fn new(image: &Image) -> Self {
            // SAFETY: a new mapping, which stays until the test process ends.
            let base = unsafe {
                let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
                let len = image.file_size() as usize;
                libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, flags, image.fd(), 0)
            };
            assert_ne!(base, libc::MAP_FAILED);
            Self { rest: SyncEngine::new(image.fd()).unwrap(), base: base.cast() }
        }
    }

    impl Engine for Thorough {
        const CONCURRENT: bool = false;

        unsafe fn submit(&mut self, token: u64, io: &Io) -> Submission {
            let mut there = [0u8; 512];
            // SAFETY: the piece is mapped, and there is a byte for each of its pages.
            unsafe {
                let piece = self.base.add((io.offset / PIECE * PIECE) as usize);
                libc::mincore(piece.cast(), PIECE as usize, there.as_mut_ptr());
                if there.iter().all(|page| page & 1 == 1) {
                    libc::madvise(piece.cast(), PIECE as usize, libc::MADV_POPULATE_READ);
                }
                self.rest.submit(token, io)
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }

        fn reap(&mut self, _into: &mut Vec<(u64, i32)>) {}

        fn in_flight(&self) -> usize {
            0
        }

        fn add_waker(&mut self, _fd: RawFd) -> io::Result<()> {
            Ok(())
        }

        fn remove_waker(&mut self, _fd: RawFd) {}

        fn wait(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The first requests of a backend are as quick as those of one that never maps: each does work
    /// of its own size. A sparse image has nothing but such requests.
    #[test]
    fn the_first_touch_of_a_piece_is_no_dearer_than_a_system_call() {
        for (filled, pieces, touched) in [(true, 48, 48), (false, 1 << 19, 4096)] {
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            let image = large(&dir, pieces, filled);
            let least = |try_once: &dyn Fn() -> Duration| (0..5).map(|_| try_once()).min().unwrap();
            let plain =
                least(&|| touch_each(&mut SyncEngine::new(image.fd()).unwrap(), &image, touched));
            let first = least(&|| touch_each(&mut mapped(&image), &image, touched));
            let control = least(&|| touch_each(&mut Thorough::new(&image), &image, touched));
            assert!(first < plain * 4, "filled {filled}: {first:?}, without a mapping {plain:?}");
            assert!(control > plain * 8, "filled {filled}: {control:?}, and {plain:?}");
        }
    }

    /// Its priority is low, so whoever waits for the image's lock must not have to wait for it.
    #[test]
    fn the_thread_that_searches_has_no_file_but_its_own() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let image = large(&dir, 1, true);
        let _engine = mapped(&image);
        let mut found = 0;
        for task in std::fs::read_dir("/proc/self/task").unwrap() {
            let task = task.unwrap().path();
            let name = std::fs::read_to_string(task.join("comm")).unwrap_or_default();
            if name.trim() != "search" {
                continue;
            }
            // Another test's may end meanwhile.
            let Ok(files) = std::fs::read_dir(task.join("fd")) else { continue };
            let files: Vec<_> =
                files.flatten().map(|file| std::fs::read_link(file.path())).collect();
            found += usize::from(files.iter().flatten().any(|file| file == image.path()));
            assert!(files.len() <= 1, "{files:?}");
        }
        assert_eq!(found, 1);
    }

    /// Reading a sparse image must not fill the memory of the host.
    #[test]
    fn holes_on_tmpfs_stay_holes() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("sparse.raw");
        let file = File::create(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        let image = Image::open(&path, OpenOptions::default()).unwrap();
        let mut engine = mapped(&image);
        let allocated = || file.metadata().unwrap().blocks() * 512;
        let mut buffer = vec![1u8; 1 << 20];
        let mut read = |engine: &mut MappedEngine<SyncEngine>, offset: u64| {
            let io = request(Op::Read, offset, &mut buffer);
            carry_out(engine, &image, vec![io]);
            assert!(buffer.iter().all(|byte| *byte == 0) || offset == 8 << 20);
            buffer[0]
        };
        (0..64).for_each(|n| assert_eq!(read(&mut engine, n << 20), 0));
        assert_eq!(allocated(), 0);
        let mut data = [7; 4096];
        carry_out(&mut engine, &image, vec![request(WRITE, 8 << 20, &mut data)]);
        assert_eq!((read(&mut engine, 8 << 20), allocated()), (7, 4096));
        carry_out(&mut engine, &image, vec![range(Op::Discard, 0, 64 << 20)]);
        (0..64).for_each(|n| assert_eq!(read(&mut engine, n << 20), 0));
        assert_eq!(allocated(), 0);
        // What another process has written meanwhile is found by an engine that starts now.
        std::os::unix::fs::FileExt::write_all_at(&file, &[9; 4096], 8 << 20).unwrap();
        let mut next = mapped(&image);
        assert_eq!(read(&mut next, 8 << 20), 9);
    }

    /// The last page may end beyond the file, which must neither grow nor lose bytes.
    #[test]
    fn an_image_of_no_whole_pages_keeps_its_size() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        for len in [512u64, 4096 + 512, 8192 + 1536] {
            let path = dir.path().join(len.to_string());
            std::fs::write(&path, vec![3u8; len as usize]).unwrap();
            let image = Image::open(&path, OpenOptions::default()).unwrap();
            let mut engine = mapped(&image);
            let (mut data, mut back) = ([4; 512], vec![0; len as usize]);
            let requests =
                vec![request(WRITE, len - 512, &mut data), request(Op::Read, 0, &mut back)];
            let outcomes = carry_out(&mut engine, &image, requests);
            assert_eq!(outcomes, [Absorbed::Finished; 2]);
            assert_eq!(std::fs::read(&path).unwrap(), back);
            assert_eq!((back.len() as u64, back[back.len() - 1]), (len, 4));
        }
    }
}

#[test]
fn a_fault_engine_that_is_off_is_transparent() {
    holds_the_contract(|image| {
        FaultEngine::new(SyncEngine::new(image.fd()).unwrap(), FaultSwitch::default())
    });
    holds_the_contract(|image| {
        FaultEngine::new(UringEngine::new(image.fd()).unwrap(), FaultSwitch::default())
    });
}

#[test]
fn the_null_engine_touches_nothing() {
    let stage = Stage::new();
    let before = stage.content();
    let mut engine = NullEngine::new().unwrap();
    let (mut read, mut written) = ([7; 512], [8; 512]);
    let requests = vec![
        request(Op::Read, 0, &mut read),
        request(WRITE, 0, &mut written),
        range(Op::Flush, 0, 0),
        range(Op::Discard, 0, 1 << 40),
    ];
    let outcomes = carry_out(&mut engine, &stage.image, requests);
    assert!(outcomes.iter().all(|outcome| *outcome == Absorbed::Finished));
    assert!(read == [7; 512] && stage.content() == before);
    wakers(|_| NullEngine::new().unwrap());
}

#[test]
fn a_fault_rule_strikes_as_often_as_it_says() {
    let stage = Stage::new();
    let switch = FaultSwitch::default();
    let mut engine = FaultEngine::new(SyncEngine::new(stage.image.fd()).unwrap(), switch.clone());
    let mut statuses = |op: Op, count: usize| -> Vec<bool> {
        let mut buffer = [0; 512];
        (0..count)
            .map(|_| {
                let io = match op {
                    Op::Flush => range(op, 0, 0),
                    _ => request(op, 0, &mut buffer),
                };
                carry_out(&mut engine, &stage.image, vec![io])[0] == Absorbed::Finished
            })
            .collect()
    };
    let rule = FaultRule { errno: Some(libc::ENOSPC), ..FaultRule::default() };
    switch.set(Some(FaultRule { op: Some("write".into()), every: 3, limit: 2, ..rule.clone() }));
    assert_eq!(statuses(Op::Read, 3), [true; 3]);
    let expected = [true, true, false, true, true, false, true, true, true];
    assert_eq!(statuses(WRITE, 9), expected);
    switch.set(Some(rule.clone()));
    assert_eq!(statuses(Op::Flush, 2), [false; 2]);
    switch.set(None);
    assert_eq!(statuses(Op::Flush, 2), [true; 2]);
    let delay = Duration::from_millis(30);
    switch.set(Some(FaultRule { delay, errno: None, limit: 1, ..rule }));
    let start = Instant::now();
    assert_eq!(statuses(WRITE, 2), [true; 2]);
    assert!(start.elapsed() >= delay);
}
