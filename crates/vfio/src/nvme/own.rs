//! Driving a controller by queues in memory of our own: to ask what it is, and to bring it to where another
//! one was.

use std::io;
use std::time::{Duration, Instant};

use super::spec::{self, CQE, SQE, admin, cc, csts, register};
use super::state::{Namespace, Pair, State};
use crate::function::Function;
use crate::iommu::Own;

/// Words of a command.
type Words = [u32; 16];

/// How long a command may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Commands that are on their way together.
const BATCH: u32 = 64;
/// Namespaces that a controller may lead to: what is known of each is a part of the state.
const NAMESPACES: usize = 128;
/// Bytes of a block, as a power of two: the least, and a bound that no device reaches.
const SHIFTS: std::ops::RangeInclusive<u8> = 9..=32;
/// While nothing of a guest is mapped, any address will do.
const PROBE: u64 = 0x10_0000;

fn told(what: &str, error: &io::Error) -> String {
    format!("cannot {what}: {error}")
}

fn wait_until(is_so: impl Fn() -> bool, patience: Duration) -> bool {
    let begun = Instant::now();
    while !is_so() {
        if begun.elapsed() > patience {
            return false;
        }
        std::thread::sleep(Duration::from_micros(5));
    }
    true
}

/// A pair of queues of ours, at any address.
struct Queues {
    id: u16,
    completes_in: u16,
    submissions: Own,
    completions: Own,
    sizes: (u32, u32),
    tail: u32,
    head: u32,
    phase: bool,
    /// Commands in all.
    count: u32,
}

impl Queues {
    fn new(pair: &Pair) -> io::Result<Self> {
        let (from, to) = (pair.submissions, pair.completions);
        Ok(Self {
            id: pair.id,
            completes_in: pair.completes_in,
            submissions: Own::new(from.address, u64::from(from.size) * SQE)?,
            completions: Own::new(to.address, u64::from(to.size) * CQE)?,
            sizes: (from.size, to.size),
            tail: 0,
            head: 0,
            phase: true,
            count: 0,
        })
    }

    fn doorbell(number: u16, completes: bool) -> u64 {
        register::DOORBELLS + 8 * u64::from(number) + if completes { 4 } else { 0 }
    }

    /// Gives the same command so often, and waits for each; the result and the status of the last one.
    fn run(
        &mut self,
        function: &Function,
        words: &Words,
        times: u32,
    ) -> Result<(u32, u16), String> {
        let mut left = times;
        let mut last = (0, 0);
        let most = BATCH.min(self.sizes.0 - 1).min(self.sizes.1 - 1);
        while left > 0 {
            let batch = left.min(most);
            for _ in 0..batch {
                let mut words = *words;
                words[0] |= (self.count & 0xffff) << 16;
                self.submissions.put(u64::from(self.tail) * SQE, &words);
                self.tail = (self.tail + 1) % self.sizes.0;
                self.count = self.count.wrapping_add(1);
            }
            function.write(Self::doorbell(self.id, false), self.tail);
            for _ in 0..batch {
                let at = u64::from(self.head) * CQE + 12;
                let came = || (self.completions.word(at) >> 16 & 1 != 0) == self.phase;
                if !wait_until(came, PATIENCE) {
                    return Err(format!("queue {} of the device does not answer", self.id));
                }
                let status = (self.completions.word(at) >> 17) as u16 & 0x7ff;
                last = (self.completions.word(at - 12), status);
                self.head = (self.head + 1) % self.sizes.1;
                self.phase ^= self.head == 0;
            }
            function.write(Self::doorbell(self.completes_in, true), self.head);
            left -= batch;
        }
        Ok(last)
    }

    /// One that has to succeed.
    fn ask(&mut self, function: &Function, what: &str, words: &Words) -> Result<u32, String> {
        match self.run(function, words, 1)? {
            (result, 0) => Ok(result),
            (_, status) => Err(format!("the device refused to {what}, status {status:#x}")),
        }
    }
}

/// A command, by its dwords from 10 on.
fn command(opcode: u8, namespace: u32, data: u64, dwords: &[u32]) -> Words {
    let mut words = [0; 16];
    (words[0], words[1]) = (opcode.into(), namespace);
    (words[6], words[7]) = (data as u32, (data >> 32) as u32);
    words[10..10 + dwords.len()].copy_from_slice(dwords);
    words
}

fn become_ready(function: &Function, cc: u32, capabilities: u64) -> Result<(), String> {
    let on = cc & cc::EN != 0;
    function.write(register::CC, cc);
    let units = (capabilities >> spec::TIMEOUT_SHIFT & 0xff) as u32 + 1;
    let is_so = || (function.read(register::CSTS) & csts::RDY != 0) == on;
    match wait_until(is_so, units * Duration::from_millis(500)) {
        true => Ok(()),
        false => Err(format!(
            "the device does not become {}, CSTS {:#x}",
            if on { "ready" } else { "idle" },
            function.read(register::CSTS)
        )),
    }
}

/// What a controller is, found out with the guest's memory out of its reach. It is reset in the end.
pub(super) fn probe(function: &mut Function) -> Result<Vec<Namespace>, String> {
    let ring = |address, size| super::state::Ring { address, size, at: 0 };
    let pair = Pair {
        id: 0,
        completes_in: 0,
        submissions: ring(PROBE, 8),
        completions: ring(PROBE + 0x1000, 8),
        flags: (0, 0),
    };
    let data = Own::new(PROBE + 0x2000, 4096).map_err(|error| told("find memory", &error))?;
    let mut queues = Queues::new(&pair).map_err(|error| told("find memory", &error))?;
    let lent = [&queues.submissions, &queues.completions, &data];
    for own in lent {
        function.iommu.lend(own).map_err(|error| told("lend memory", &error))?;
    }
    function.set_master(true).map_err(|error| told("allow DMA", &error))?;
    let found = look(function, &mut queues, &data);
    function.set_master(false).map_err(|error| told("forbid DMA", &error))?;
    function.reset().map_err(|error| told("reset the device", &error))?;
    for own in [&queues.submissions, &queues.completions, &data] {
        function.iommu.take_back(own).map_err(|error| told("take memory back", &error))?;
    }
    found
}

fn look(function: &Function, queues: &mut Queues, data: &Own) -> Result<Vec<Namespace>, String> {
    let capabilities = function.read_long(register::CAP);
    function.write(register::AQA, 7 << 16 | 7);
    function.write_long(register::ASQ, queues.submissions.address);
    function.write_long(register::ACQ, queues.completions.address);
    become_ready(function, cc::ENTRY_SIZES | cc::EN, capabilities)?;
    let list = command(admin::IDENTIFY, 0, data.address, &[2]);
    queues.ask(function, "list its namespaces", &list)?;
    let ids: Vec<u32> = (0..NAMESPACES as u64).map(|index| data.word(4 * index)).collect();
    let mut namespaces = Vec::new();
    if data.word(4 * NAMESPACES as u64) != 0 {
        return Err(format!("it leads to more than {NAMESPACES} namespaces"));
    }
    for id in ids.into_iter().take_while(|id| *id != 0) {
        let identify = command(admin::IDENTIFY, id, data.address, &[0]);
        queues.ask(function, "identify a namespace", &identify)?;
        namespaces.push(namespace(id, &data.bytes(0, 256))?);
    }
    Ok(namespaces)
}

/// What the first 256 bytes say that a namespace is identified by.
fn namespace(id: u32, bytes: &[u8]) -> Result<Namespace, String> {
    let format = usize::from(bytes[26] & 0xf);
    let [low, high, shift, _] = std::array::from_fn(|i| bytes[128 + 4 * format + i]);
    if low != 0 || high != 0 {
        return Err(format!("namespace {id} has metadata, which is not understood"));
    }
    if !SHIFTS.contains(&shift) {
        return Err(format!("namespace {id} has blocks of 2^{shift} bytes"));
    }
    Ok(Namespace {
        id,
        blocks: u64::from_le_bytes(std::array::from_fn(|i| bytes[i])),
        block_shift: shift,
        name: bytes[104..128].iter().map(|byte| format!("{byte:02x}")).collect(),
    })
}

/// A command that does nothing: reads a block to `data`, a page. A larger one would end elsewhere.
fn nothing(namespaces: &[Namespace], data: u64) -> Words {
    match namespaces.iter().find(|namespace| 1 << namespace.block_shift <= semper_device::PAGE) {
        Some(namespace) => command(spec::READ, namespace.id, data, &[0]),
        None => command(semper_nvme::spec::io::FLUSH, u32::MAX, 0, &[]),
    }
}

/// Brings a controller that was reset to where the state's was: the same queues at the same addresses, with
/// the same heads, tails and phases; what it does on its way there happens in memory of ours. Event requests
/// are not made: they are for the guest's own memory.
pub(super) fn follow(function: &mut Function, state: &State) -> Result<(), String> {
    let Some(admin) = &state.admin else { return Ok(()) };
    let mut queues = Vec::new();
    for pair in [admin].into_iter().chain(&state.pairs) {
        queues.push(Queues::new(pair).map_err(|error| told("find memory", &error))?);
    }
    // One more page, for what is read: behind all of them, and never the interrupts' addresses.
    let end = queues.iter().flat_map(|queue| [&queue.submissions, &queue.completions]);
    let end = end.map(|own| own.address + own.len).max().unwrap_or(0);
    let place = if (0xfe00_0000..1 << 32).contains(&end) { 1 << 32 } else { end };
    let data = Own::new(place, 4096).map_err(|error| told("find memory", &error))?;
    let mut lent: Vec<&Own> = vec![&data];
    lent.extend(queues.iter().flat_map(|queue| [&queue.submissions, &queue.completions]));
    let mut outcome = Ok(());
    let mut reached = 0;
    for own in &lent {
        if let Err(error) = function.iommu.lend(own) {
            outcome = Err(told("lend memory", &error));
            break;
        }
        reached += 1;
    }
    drop(lent);
    if outcome.is_ok() {
        outcome = go(function, state, &mut queues, data.address);
    }
    if outcome.is_err() {
        // Before its memory goes.
        function.reset().map_err(|error| told("reset the device", &error))?;
    }
    let lent = [&data].into_iter();
    let lent = lent.chain(queues.iter().flat_map(|queue| [&queue.submissions, &queue.completions]));
    for own in lent.take(reached) {
        function.iommu.take_back(own).map_err(|error| told("take memory back", &error))?;
    }
    outcome
}

fn go(function: &Function, state: &State, queues: &mut [Queues], data: u64) -> Result<(), String> {
    let Some((admin, pairs)) = queues.split_first_mut() else { return Ok(()) };
    let registers = state.registers;
    function.write(register::AQA, registers.aqa);
    function.write_long(register::ASQ, registers.asq);
    function.write_long(register::ACQ, registers.acq);
    become_ready(function, registers.cc, state.capabilities)?;
    for words in &state.features {
        let set = command(admin::SET_FEATURES, 0, 0, words);
        admin.ask(function, "set a feature", &set)?;
    }
    for pair in &state.pairs {
        let (from, to) = (pair.submissions, pair.completions);
        let words = [(to.size - 1) << 16 | u32::from(pair.completes_in), pair.flags.1];
        let create = command(admin::CREATE_CQ, 0, to.address, &words);
        admin.ask(function, "make a completion queue", &create)?;
        let words = [
            (from.size - 1) << 16 | u32::from(pair.id),
            u32::from(pair.completes_in) << 16 | pair.flags.0 & 0xffff,
        ];
        let create = command(admin::CREATE_SQ, 0, from.address, &words);
        admin.ask(function, "make a submission queue", &create)?;
    }
    let nothing = nothing(&state.namespaces, data);
    for (pair, queue) in state.pairs.iter().zip(pairs) {
        let times = State::commands(pair, 0, 0).ok_or("a queue cannot be where it was")?;
        queue.run(function, &nothing, times)?;
    }
    let pair = state.admin.as_ref().ok_or("there is no admin queue")?;
    let waiting = state.events.len() as u32;
    let times = State::commands(pair, waiting, admin.count);
    let times = times.ok_or("the admin queue cannot be where it was")? - admin.count;
    let ask = command(admin::GET_FEATURES, 0, 0, &[spec::feature::QUEUES.into()]);
    admin.run(function, &ask, times).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identified(metadata: u8, shift: u8) -> Result<Namespace, String> {
        let mut bytes = [0; 256];
        // The second format is in use.
        (bytes[0], bytes[26], bytes[132], bytes[134]) = (9, 1, metadata, shift);
        namespace(1, &bytes)
    }

    #[test]
    fn a_namespace_has_blocks_of_a_size_that_can_be_and_no_metadata() {
        let found = identified(0, 12).unwrap();
        assert_eq!((found.blocks, found.block_shift, found.name.len()), (9, 12, 48));
        for (metadata, shift) in [(8, 12), (0, 0), (0, 64), (0, 255)] {
            assert!(identified(metadata, shift).is_err(), "{metadata} {shift}");
        }
    }

    #[test]
    fn what_does_nothing_writes_no_more_than_the_page_that_is_its_own() {
        let read = |shifts: &[u8]| {
            let of = |shift: &u8| Namespace {
                id: shift.to_owned().into(),
                ..identified(0, *shift).unwrap()
            };
            let words = nothing(&shifts.iter().map(of).collect::<Vec<_>>(), 0x5000);
            (words[0] as u8, words[1], words[6])
        };
        assert_eq!(read(&[12]), (spec::READ, 12, 0x5000));
        assert_eq!(read(&[16, 9]), (spec::READ, 9, 0x5000));
        assert_eq!(read(&[13]), (semper_nvme::spec::io::FLUSH, u32::MAX, 0));
        assert_eq!(read(&[]), (semper_nvme::spec::io::FLUSH, u32::MAX, 0));
    }
}
