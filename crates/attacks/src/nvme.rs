//! A guest against its NVMe controller: registers, doorbells, commands, and lists that lead anywhere.

use std::cell::OnceCell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use semper_block::{Image, OpenOptions, SyncEngine};
use semper_device::ledger::{Cell, Ledger};
use semper_device::page::{Page, WORDS};
use semper_device::{Bus, Device, Route, Unreachable};
use semper_nvme::{Controller, Settings, Store, journal};
use semper_ring::GuestMemory;
use tempfile::NamedTempFile;

use crate::bytes::Bytes;

const MEMORY: u64 = 256 << 10;
const IMAGE: u64 = 1 << 20;
const QUEUES: u16 = 2;
/// Where a sensible driver has its queues, by number: admin, and one pair; and its data.
const SUBMISSIONS: [u64; 2] = [0x1000, 0x3000];
const COMPLETIONS: [u64; 2] = [0x2000, 0x4000];
const DATA: u64 = 0x8000;

struct Stage {
    memory: Arc<GuestMemory>,
    page: Page,
    image: NamedTempFile,
}

thread_local!(static STAGE: OnceCell<Stage> = const { OnceCell::new() });

impl Stage {
    fn new() -> Self {
        let image = NamedTempFile::new().expect("a file for the image");
        image.as_file().set_len(IMAGE).expect("room for the image");
        let memory = GuestMemory::anonymous(0, MEMORY as usize).expect("memory");
        let page = Page::new(0x4000, 0x1000).expect("a page");
        Self { memory: Arc::new(memory), page, image }
    }

    fn controller(&self) -> Controller {
        let image = Image::open(self.image.path(), OpenOptions::default()).expect("the image");
        let engine = SyncEngine::new(image.fd()).expect("an engine");
        let settings = Settings { serial: "attacked".to_owned(), queues: QUEUES };
        Controller::new(settings, Box::new(Store::new(Arc::new(image), engine)))
    }
}

/// Holds the controller to the memory that there is.
struct Guarded<'a> {
    memory: &'a Arc<GuestMemory>,
    route: Route,
}

impl Bus for Guarded<'_> {
    fn memory(&self) -> &Arc<GuestMemory> {
        self.memory
    }

    fn route(&self) -> Route {
        self.route
    }

    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Unreachable> {
        let len = into.len() as u64;
        let from = self.memory.translate(address, len).ok_or(Unreachable { address, len })?;
        // SAFETY: `translate` checked the range.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Unreachable> {
        let len = bytes.len() as u64;
        let to = self.memory.translate(address, len).ok_or(Unreachable { address, len })?;
        // SAFETY: `translate` checked the range.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    fn wrote(&mut self, address: u64, len: u64) {
        let end = address.checked_add(len).expect("no wrap");
        assert!(end <= MEMORY, "{len} bytes at {address:#x} were written");
    }

    fn interrupt(&mut self, vector: u16) {
        assert!(vector <= QUEUES, "vector {vector}");
    }

    fn is_congested(&self) -> bool {
        false
    }
}

/// Registers, doorbells and memory as `data` describes; then the state is saved and restored.
pub fn nvme(data: &[u8]) {
    STAGE.with(|stage| attack(stage.get_or_init(Stage::new), &mut Bytes(data)));
}

fn attack(stage: &Stage, bytes: &mut Bytes<'_>) {
    let ledger = Arc::new(Ledger::new(journal::WORDS).expect("a ledger"));
    let mut controller = stage.controller();
    controller.keep_in(Arc::clone(&ledger));
    stage.page.clear();
    let mut bus = Guarded { memory: &stage.memory, route: Route::Direct };
    bus.write(0, &[0; DATA as usize]).expect("memory");
    let mut tails = [0u32; 2];
    if bytes.u8() % 4 != 0 {
        begin(&mut controller, stage, &mut bus, &mut tails);
    }
    for _ in 0..200 {
        if bytes.is_empty() {
            break;
        }
        // Mostly commands: what disables the controller ends what can be tried.
        match bytes.u8() % 32 {
            0 => controller.write(u64::from(bytes.u8()), &bytes.u64().to_le_bytes()),
            1 => {
                let offset =
                    [0x0c, 0x10, 0x14, 0x24, 0x28, 0x2c, 0x30, 0x34][usize::from(bytes.u8() % 8)];
                controller.write(offset, &bytes.u32().to_le_bytes());
            }
            2 => stage.page.store(usize::from(bytes.u8()) % WORDS, bytes.u32() % 70),
            3..6 => {
                let address = u64::from(bytes.u32()) % (MEMORY - 8);
                bus.write(address, &bytes.u64().to_le_bytes()).expect("memory");
            }
            6 => bus.route = if bytes.u8() % 2 == 0 { Route::Direct } else { Route::Mediated },
            8 => controller = next(stage, &ledger).expect("what this controller has kept"),
            7 => {
                let mut into = [0; 16];
                controller.read(bytes.u64(), &mut into[..usize::from(bytes.u8() % 17)]);
            }
            _ => command(stage, bytes, &mut bus, &mut tails),
        }
        controller.step(&stage.page, &mut bus);
    }
    move_it(controller, stage, &mut bus, bytes);
    succeed_wrongly(stage, &mut bus, &ledger, bytes);
}

/// The process has died, and another one goes on.
fn next(stage: &Stage, ledger: &Arc<Ledger>) -> Result<Controller, String> {
    let mut next = stage.controller();
    next.keep_in(Arc::clone(ledger));
    next.hold(true);
    next.recover(&stage.page)?;
    next.hold(false);
    Ok(next)
}

/// A process that its guest has taken over leaves what it likes.
fn succeed_wrongly(
    stage: &Stage,
    bus: &mut Guarded<'_>,
    ledger: &Arc<Ledger>,
    bytes: &mut Bytes<'_>,
) {
    let mut text = ledger.get(Cell::Device).unwrap_or_default().into_bytes();
    if let Some(at) = usize::from(bytes.u16()).checked_rem(text.len()) {
        text[at] = b" 0123456789{}[],"[usize::from(bytes.u8() % 16)];
    }
    if let Ok(text) = String::from_utf8(text) {
        ledger.put(Cell::Device, &text);
    }
    for _ in 0..bytes.u8() % 64 {
        // Queues, and the first slots.
        let word = ledger.word(usize::from(bytes.u16() % 600));
        word.store(u64::from(bytes.u8() % 8), Ordering::Relaxed);
    }
    if let Ok(mut controller) = next(stage, ledger) {
        for _ in 0..8 {
            controller.step(&stage.page, bus);
        }
    }
}

/// What a sensible driver does at first.
fn begin(controller: &mut Controller, stage: &Stage, bus: &mut Guarded<'_>, tails: &mut [u32; 2]) {
    controller.write(0x24, &(15u32 << 16 | 15).to_le_bytes());
    controller.write(0x28, &SUBMISSIONS[0].to_le_bytes());
    controller.write(0x30, &COMPLETIONS[0].to_le_bytes());
    controller.write(0x14, &0x0046_0001u32.to_le_bytes());
    controller.step(&stage.page, bus);
    for (opcode, base, eleven) in
        [(5u8, COMPLETIONS[1], 1u32 << 16 | 3), (1, SUBMISSIONS[1], 1 << 16 | 1)]
    {
        let mut entry = [0; 64];
        entry[0] = opcode;
        entry[24..32].copy_from_slice(&base.to_le_bytes());
        entry[40..44].copy_from_slice(&(15u32 << 16 | 1).to_le_bytes());
        entry[44..48].copy_from_slice(&eleven.to_le_bytes());
        put(stage, bus, tails, 0, &entry);
        controller.step(&stage.page, bus);
    }
}

fn put(stage: &Stage, bus: &mut Guarded<'_>, tails: &mut [u32; 2], queue: usize, entry: &[u8]) {
    let at = SUBMISSIONS[queue] + u64::from(tails[queue]) * 64;
    bus.write(at, entry).expect("memory");
    tails[queue] = (tails[queue] + 1) % 16;
    stage.page.store(2 * queue, tails[queue]);
    // It looks at its completions as well, without reading them.
    stage.page.store(2 * queue + 1, tails[queue]);
}

/// A command of some sense, with data behind addresses of some sense.
fn command(stage: &Stage, bytes: &mut Bytes<'_>, bus: &mut Guarded<'_>, tails: &mut [u32; 2]) {
    let queue = usize::from(bytes.u8() % 2);
    let mut entry = [0; 64];
    let known = [[6, 2, 9, 10, 5, 1, 0, 4, 8, 12], [2, 1, 2, 1, 8, 9, 0, 2, 1, 9]][queue];
    entry[0] = match bytes.u8() % 12 {
        11 => bytes.u8(),
        kind => known[usize::from(kind) % known.len()],
    };
    // PRP, SGL of both kinds, neither, fused; the one namespace, mostly.
    entry[1] = [0, 0, 0, 0, 0x40, 0x80, 0xc0, 1][usize::from(bytes.u8() % 8)];
    entry[4] = [1, 1, 1, 1, 1, 1, 0, 2][usize::from(bytes.u8() % 8)];
    let somewhere = |bytes: &mut Bytes<'_>| match bytes.u8() % 8 {
        0 => bytes.u64(),
        1 => MEMORY - u64::from(bytes.u8()),
        2 => DATA + u64::from(bytes.u16()),
        3 => DATA + 0x1000 - 8,
        _ => DATA + u64::from(bytes.u8() % 32) * 0x1000,
    };
    entry[24..32].copy_from_slice(&somewhere(bytes).to_le_bytes());
    let second = if entry[1] >= 0x40 {
        // An SGL descriptor: length and type.
        u64::from(bytes.u16() % 600) | u64::from(bytes.u8()) << 56
    } else {
        somewhere(bytes)
    };
    entry[32..40].copy_from_slice(&second.to_le_bytes());
    let first = if bytes.u8() % 8 == 0 { bytes.u64() } else { u64::from(bytes.u16() % 2100) };
    entry[40..48].copy_from_slice(&first.to_le_bytes());
    let most = if bytes.u8() % 8 == 0 { 0xc200_01ff } else { 0xc200_000f };
    entry[48..52].copy_from_slice(&(bytes.u32() & most).to_le_bytes());
    put(stage, bus, tails, queue, &entry);
}

/// Whatever was done, the state can be saved, and is taken by another controller; a state with another
/// byte is refused, or taken without harm.
fn move_it(
    mut controller: Controller,
    stage: &Stage,
    bus: &mut Guarded<'_>,
    bytes: &mut Bytes<'_>,
) {
    controller.hold(true);
    for _ in 0..64 {
        controller.step(&stage.page, bus);
    }
    assert_eq!(controller.in_flight(), 0, "a synchronous engine has nothing in flight");
    let state = controller.save();
    let mut other = stage.controller();
    other.hold(true);
    other.restore(&state, &stage.page, false).expect("a state of this device");
    assert_eq!(other.save(), state);
    let mut wrong = state.into_bytes();
    let at = usize::from(bytes.u16()) % wrong.len();
    wrong[at] = b" 0123456789{}[],"[usize::from(bytes.u8() % 16)];
    if let Ok(wrong) = String::from_utf8(wrong) {
        let _ = other.restore(&wrong, &stage.page, bytes.u8() % 2 == 0);
    }
    other.hold(false);
    for _ in 0..8 {
        other.step(&stage.page, bus);
    }
}
