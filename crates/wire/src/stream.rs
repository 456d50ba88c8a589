//! QEMU's migration stream, as far as it can be understood without QEMU.
//!
//! ```text
//!   stream    "QEVM" | version be32 = 3 | sections …
//!   section   7 configuration: length be32, machine type, then subsections (5 …)
//!             1 start: id be32, name (u8 + bytes), instance be32, version be32, content
//!             2 part, 3 end: id be32, content
//!             4 full: as start
//!             8 command: number be16, length be16, data; number 7 wraps a blob: be32, bytes
//!             0 end of the sections; a description of the machine may follow
//!   footer    0x7e, id be32: after the content of 1 to 4
//!   RAM       its content is a list of: address|flags be64, name of the block unless CONTINUE, and
//!               MEM_SIZE 0x04  the blocks: name, length be64, perhaps more, until address is used up
//!               ZERO     0x02  one byte, which fills the page
//!               PAGE     0x08  the page
//!               XBZRLE   0x40  encoding u8, length be16, data
//!               MULTIFD_FLUSH 0x200  nothing
//!               EOS      0x10  nothing: the content ends
//! ```
//!
//! Sources: QEMU `migration/savevm.c`, `migration/ram.c`, `docs/devel/migration/`. Only RAM has a
//! content that says where it ends. At anything else without a length (a device's section, an
//! unknown flag) the parser gives up for good, and all that follows is passed on as it is: in
//! precopy that is the state of the devices at the very end; in postcopy it is a blob whose length
//! is known, and pages follow it.

use crate::{PAGE_SIZE, Page};

/// The longest thing that is looked at as a whole: a page with the longest header.
pub const MAX_ITEM: usize = 8 + 1 + 255 + PAGE_SIZE;

const ZERO: u64 = 0x02;
const MEM_SIZE: u64 = 0x04;
const PAGE: u64 = 0x08;
const EOS: u64 = 0x10;
const CONTINUE: u64 = 0x20;
const XBZRLE: u64 = 0x40;
const MULTIFD_FLUSH: u64 = 0x200;
const FLAGS: u64 = 0xfff;

const COMMAND_PACKAGED: u16 = 7;
const TARGET_PAGE_BITS: u32 = PAGE_SIZE.trailing_zeros();

/// Flags of a page that follows its predecessor in the same block.
pub(crate) const NEXT_PAGE: u64 = PAGE | CONTINUE;
/// Flags of a zero page that does.
pub(crate) const NEXT_ZERO: u64 = ZERO | CONTINUE;

/// Takes the stream apart: everything in it arrives here, each byte once and in order.
pub trait Sink {
    /// Bytes that are no page.
    fn raw(&mut self, bytes: &[u8]);
    /// A page that QEMU found to be zero; its header is the address with [`ZERO`|CONTINUE], and the
    /// byte that fills it is 0.
    ///
    /// [`ZERO`|CONTINUE]: self
    fn zero(&mut self, address: u64);
    /// A page. Its header is the address with PAGE|CONTINUE where `header` is none, else these bytes.
    fn page(&mut self, address: u64, header: Option<&[u8]>, page: &Page);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the first byte.
    Magic,
    /// Before the type of a section, a footer or a command.
    Section,
    /// After the configuration: are there subsections?
    Subsections,
    /// In the list of capabilities; so many are left.
    Capabilities(u32),
    /// In the content of RAM.
    Ram,
    /// In the table of blocks; the lengths to come have this sum.
    Blocks(u64),
    /// Bytes of a known number, and what comes then.
    Opaque(u64, Next),
    /// Nothing is understood any longer.
    Lost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Section,
    Subsections,
    Ram,
}

impl From<Next> for State {
    fn from(next: Next) -> Self {
        match next {
            Next::Section => State::Section,
            Next::Subsections => State::Subsections,
            Next::Ram => State::Ram,
        }
    }
}

/// Finds the pages in a stream, however it is cut into pieces.
#[derive(Clone, Debug)]
pub struct Parser {
    state: State,
    /// Id of the section that is RAM.
    ram: Option<u32>,
    /// Blocks have their addresses in the table.
    ignore_shared: bool,
    /// Bytes of memory, where every page of it comes once before any comes again.
    memory: u64,
    lost: &'static str,
}

impl Default for Parser {
    fn default() -> Self {
        Self { state: State::Magic, ram: None, ignore_shared: false, memory: 0, lost: "" }
    }
}

/// The front of the input, or nothing where it is too short.
fn be16(input: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*input.get(at..)?.first_chunk()?))
}

fn be32(input: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*input.get(at..)?.first_chunk()?))
}

fn be64(input: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*input.get(at..)?.first_chunk()?))
}

/// A name with its length before it, and where it ends.
fn name(input: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let end = at + 1 + usize::from(*input.get(at)?);
    Some((input.get(at + 1..end)?, end))
}

impl Parser {
    /// Takes as many whole items as there are from the front of `input`; the number of bytes taken.
    /// What is left is shorter than [`MAX_ITEM`] and belongs before the next input.
    pub fn parse(&mut self, input: &[u8], sink: &mut impl Sink) -> usize {
        let mut at = 0;
        while let Some(taken) = self.item(&input[at..], sink) {
            at += taken;
            if at == input.len() {
                break;
            }
        }
        at
    }

    /// Why nothing is understood any longer, if so.
    pub fn lost(&self) -> Option<&'static str> {
        (self.state == State::Lost).then_some(self.lost)
    }

    /// Takes one item; none if it is not there as a whole.
    fn item(&mut self, input: &[u8], sink: &mut impl Sink) -> Option<usize> {
        match self.state {
            State::Ram => self.ram_item(input, sink),
            State::Lost => {
                sink.raw(input);
                (!input.is_empty()).then_some(input.len())
            }
            State::Opaque(left, next) => {
                let taken = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
                sink.raw(&input[..taken]);
                let left = left - taken as u64;
                self.state = if left == 0 { next.into() } else { State::Opaque(left, next) };
                (taken > 0 || left == 0).then_some(taken)
            }
            State::Magic => {
                let head: &[u8; 8] = input.first_chunk()?;
                self.state = State::Section;
                if head != b"QEVM\0\0\0\x03" {
                    self.lose("it does not begin as a migration stream of version 3");
                }
                Self::pass(input, 8, sink)
            }
            State::Section => self.section(input, sink),
            State::Subsections => self.subsection(input, sink),
            State::Capabilities(left) => {
                let (name, end) = name(input, 0)?;
                self.ignore_shared |= name == b"x-ignore-shared";
                self.state = match left {
                    ..=1 => State::Subsections,
                    _ => State::Capabilities(left - 1),
                };
                Self::pass(input, end, sink)
            }
            State::Blocks(left) => self.block(input, left, sink),
        }
    }

    /// Bytes of the guest's memory, all of which is sent in the first pass; 0 where that is not so,
    /// or not yet known.
    pub fn memory(&self) -> u64 {
        match self.state {
            State::Lost => 0,
            _ => self.memory,
        }
    }

    fn pass(input: &[u8], len: usize, sink: &mut impl Sink) -> Option<usize> {
        sink.raw(&input[..len]);
        Some(len)
    }

    fn lose(&mut self, why: &'static str) {
        self.state = State::Lost;
        self.lost = why;
    }

    /// Gives up, with the item at hand not yet taken.
    fn lose_here(&mut self, why: &'static str) -> Option<usize> {
        self.lose(why);
        Some(0)
    }

    fn opaque(&mut self, len: u64, next: Next) {
        self.state = if len == 0 { next.into() } else { State::Opaque(len, next) };
    }

    fn section(&mut self, input: &[u8], sink: &mut impl Sink) -> Option<usize> {
        match *input.first()? {
            7 => {
                let length = be32(input, 1)?;
                self.opaque(length.into(), Next::Subsections);
                Self::pass(input, 5, sink)
            }
            kind @ (1 | 4) => {
                let id = be32(input, 1)?;
                let (name, end) = name(input, 5)?;
                input.get(end..end + 8)?;
                if kind != 1 || name != b"ram" {
                    return self.lose_here("a section that only its device can read");
                }
                self.ram = Some(id);
                self.state = State::Ram;
                Self::pass(input, end + 8, sink)
            }
            2 | 3 => {
                if Some(be32(input, 1)?) != self.ram {
                    return self.lose_here("a part of a section other than RAM");
                }
                self.state = State::Ram;
                Self::pass(input, 5, sink)
            }
            0x7e => {
                input.get(..5)?;
                Self::pass(input, 5, sink)
            }
            8 => {
                let (command, length) = (be16(input, 1)?, be16(input, 3)?);
                if command == COMMAND_PACKAGED && length == 4 {
                    let blob = be32(input, 5)?;
                    // Postcopy: the guest runs there, and asks for pages.
                    self.memory = 0;
                    self.opaque(blob.into(), Next::Section);
                    return Self::pass(input, 9, sink);
                }
                self.opaque(length.into(), Next::Section);
                Self::pass(input, 5, sink)
            }
            0 => self.lose_here("the end of the sections"),
            _ => self.lose_here("a section of an unknown type"),
        }
    }

    fn subsection(&mut self, input: &[u8], sink: &mut impl Sink) -> Option<usize> {
        if *input.first()? != 5 {
            self.state = State::Section;
            return Some(0);
        }
        let (name, end) = name(input, 1)?;
        let (_version, first) = (be32(input, end)?, be32(input, end + 4)?);
        let content = end + 4;
        match name {
            b"configuration/capabilities" => {
                self.state = match first {
                    0 => State::Subsections,
                    count => State::Capabilities(count),
                };
                Self::pass(input, content + 4, sink)
            }
            b"configuration/target-page-bits" if first == TARGET_PAGE_BITS => {
                Self::pass(input, content + 4, sink)
            }
            b"configuration/uuid" => {
                self.opaque(16, Next::Subsections);
                Self::pass(input, content, sink)
            }
            _ => self.lose_here("a configuration that is not known"),
        }
    }

    fn ram_item(&mut self, input: &[u8], sink: &mut impl Sink) -> Option<usize> {
        let header = be64(input, 0)?;
        let (address, flags) = (header & !FLAGS, header & FLAGS);
        // The two that nearly all of a stream consists of.
        if flags == NEXT_PAGE {
            let page = input.get(8..)?.first_chunk()?;
            sink.page(address, None, page);
            return Some(8 + PAGE_SIZE);
        }
        if flags == NEXT_ZERO {
            match *input.get(8)? {
                0 => sink.zero(address),
                _ => sink.raw(&input[..9]),
            }
            return Some(9);
        }
        let named = flags & (ZERO | PAGE | XBZRLE) != 0 && flags & CONTINUE == 0;
        let end = if named { name(input, 8)?.1 } else { 8 };
        match flags & !CONTINUE {
            PAGE => {
                let page = input.get(end..)?.first_chunk()?;
                sink.page(address, Some(&input[..end]), page);
                Some(end + PAGE_SIZE)
            }
            ZERO => {
                input.get(end)?;
                Self::pass(input, end + 1, sink)
            }
            EOS => {
                self.state = State::Section;
                Self::pass(input, 8, sink)
            }
            MEM_SIZE => {
                self.memory = address;
                self.state = if address == 0 { State::Ram } else { State::Blocks(address) };
                Self::pass(input, 8, sink)
            }
            XBZRLE => {
                let length = be16(input, end + 1)?;
                self.opaque(length.into(), Next::Ram);
                Self::pass(input, end + 3, sink)
            }
            MULTIFD_FLUSH => Self::pass(input, 8, sink),
            _ => self.lose_here("pages of an unknown kind"),
        }
    }

    /// One line of the table of blocks. After the length may stand the size of the block's pages
    /// (postcopy, where sizes differ), and its address (x-ignore-shared). The first cannot be known
    /// beforehand, but shows itself: no name is empty, and no header is without flags.
    fn block(&mut self, input: &[u8], left: u64, sink: &mut impl Sink) -> Option<usize> {
        let (name, end) = name(input, 0)?;
        let length = be64(input, end)?;
        let Some(left) = left.checked_sub(length).filter(|_| !name.is_empty()) else {
            return self.lose_here("a table of blocks that does not add up");
        };
        let mut end = end + 8;
        if self.ignore_shared {
            be64(input, end)?;
            end += 8;
        }
        let page_size = match left {
            0 => be64(input, end)? & FLAGS == 0,
            _ => *input.get(end)? == 0,
        };
        if page_size {
            be64(input, end)?;
            end += 8;
        }
        self.state = if left == 0 { State::Ram } else { State::Blocks(left) };
        Self::pass(input, end, sink)
    }
}
