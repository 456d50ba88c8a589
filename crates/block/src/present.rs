//! Which pages of a file the page cache has, as far as known.
//!
//! ```text
//!   pieces   u32 for each 2 MiB    age << 3 | state
//!   pages    1 bit for each 4 KiB  counts while its piece is `Searched`
//! ```
//!
//! Requests look, note what they have seen themselves, and ask for what they do not know: each a few
//! loads and stores, whatever the size of the image. Who answers is a thread beside them (`search`).
//! To forget everything makes the age one more, and no piece of another age counts. A file that is
//! made anew has no page, which needs no look: its pieces are `Empty` until then.
//!
//! All of it is a guess. A page that is wrongly held for present costs a page of memory on tmpfs,
//! and elsewhere a wait for the medium; one that is missing here costs a system call. Threads
//! therefore change it without a lock. Where two meet, one of the two prices is paid, and never
//! does a request see wrong data.

use std::alloc::{Layout, alloc_zeroed};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

pub(crate) const PAGE_SHIFT: u32 = 12;
/// What is searched at once: 2 MiB.
pub(crate) const PIECE_SHIFT: u32 = 21;
/// Pages of a piece.
pub(crate) const PIECE_PAGES: usize = 1 << (PIECE_SHIFT - PAGE_SHIFT);
/// Words of `pages` that belong to a piece: one line of the processor's cache.
const PIECE_WORDS: usize = PIECE_PAGES / 64;
/// Pieces that can be asked for at the same time.
const QUESTIONS: usize = 1024;

const STATE_BITS: u32 = 3;
const FIRST_AGE: u32 = 1 << STATE_BITS;

/// What is known of a piece; a piece of another age, or none yet, is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum State {
    Unknown = 0,
    /// The same; somebody will look.
    Asked = 1,
    /// It has no page.
    Empty = 2,
    /// It has the pages whose bits are set.
    Searched = 3,
    /// It has all.
    Full = 4,
}

pub(crate) struct Present {
    pieces: Box<[AtomicU32]>,
    pages: Box<[AtomicU64]>,
    age: AtomicU32,
    /// What stands for a piece that nothing is noted of, which is zero.
    untouched: u32,
    /// Numbers of pieces, plus one; each has its place.
    questions: Box<[AtomicU64]>,
    /// Bytes of the file that count: whole pages.
    len: u64,
}

/// Types of which zero bytes are a value.
///
/// # Safety
/// Just that.
unsafe trait Zero {}
// SAFETY: an integer.
unsafe impl Zero for AtomicU32 {}
// SAFETY: an integer.
unsafe impl Zero for AtomicU64 {}

/// Zeros, which take memory where they are first written. Large ones may not be had.
fn zeros<T: Zero>(count: u64) -> io::Result<Box<[T]>> {
    let layout = usize::try_from(count).ok().and_then(|count| Layout::array::<T>(count).ok());
    let layout = layout.filter(|layout| layout.size() > 0).ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: the layout is not empty; zero bytes are a value of T; the box is the only owner of
    // what was allocated with the layout of its slice.
    unsafe {
        let memory = alloc_zeroed(layout).cast::<T>();
        if memory.is_null() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(Box::from_raw(std::ptr::slice_from_raw_parts_mut(memory, count as usize)))
    }
}

/// Numbers of the units of `1 << shift` bytes that the range touches.
fn units(offset: u64, len: u64, shift: u32) -> Range<u64> {
    (offset >> shift)..(offset + len).div_ceil(1 << shift)
}

impl Present {
    /// Knows nothing of a file of `len` bytes, or that it has no page.
    ///
    /// # Errors
    /// There is not enough address space.
    pub(crate) fn new(len: u64, empty: bool) -> io::Result<Self> {
        let pieces = (len >> PIECE_SHIFT) + 1;
        Ok(Self {
            pieces: zeros(pieces)?,
            pages: zeros(pieces * PIECE_WORDS as u64)?,
            age: AtomicU32::new(FIRST_AGE),
            untouched: if empty { FIRST_AGE | State::Empty as u32 } else { 0 },
            questions: zeros(QUESTIONS as u64)?,
            len,
        })
    }

    /// Bytes that count.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    fn age(&self) -> u32 {
        self.age.load(Ordering::Relaxed)
    }

    fn state_of(&self, word: u32) -> State {
        let word = if word == 0 { self.untouched } else { word };
        if word & !(FIRST_AGE - 1) != self.age() {
            return State::Unknown;
        }
        match word & (FIRST_AGE - 1) {
            1 => State::Asked,
            2 => State::Empty,
            3 => State::Searched,
            4 => State::Full,
            _ => State::Unknown,
        }
    }

    /// What is known of a piece.
    pub(crate) fn state(&self, piece: u64) -> State {
        self.state_of(self.pieces[piece as usize].load(Ordering::Relaxed))
    }

    /// Moves a piece on, unless it has changed since `before` was seen.
    fn change(&self, piece: u64, before: u32, state: State) -> bool {
        let (word, after) = (&self.pieces[piece as usize], self.age() | state as u32);
        word.compare_exchange(before, after, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    fn words(&self, piece: u64) -> &[AtomicU64] {
        let first = piece as usize * PIECE_WORDS;
        &self.pages[first..first + PIECE_WORDS]
    }

    fn has_page(&self, page: u64) -> bool {
        self.pages[(page / 64) as usize].load(Ordering::Relaxed) & (1 << (page % 64)) != 0
    }

    /// The part of the pages' range that lies in a piece.
    fn within(pages: &Range<u64>, piece: u64) -> Range<u64> {
        let first = piece * PIECE_PAGES as u64;
        pages.start.max(first)..pages.end.min(first + PIECE_PAGES as u64)
    }

    /// Whether the whole range is there, as far as known. Pieces of which nothing is known are
    /// asked for; true in the second place if there are such.
    #[inline]
    pub(crate) fn has(&self, offset: u64, len: u64) -> (bool, bool) {
        let (mut all, mut asked) = (true, false);
        let pages = units(offset, len, PAGE_SHIFT);
        for piece in units(offset, len, PIECE_SHIFT) {
            let before = self.pieces[piece as usize].load(Ordering::Relaxed);
            all &= match self.state_of(before) {
                State::Full => true,
                State::Searched => {
                    all && Self::within(&pages, piece).all(|page| self.has_page(page))
                }
                State::Empty | State::Asked => false,
                State::Unknown => {
                    asked |= self.ask(piece, before);
                    false
                }
            };
        }
        (all, asked)
    }

    /// Asks for a piece, if there is room for the question; else a later request will.
    #[cold]
    fn ask(&self, piece: u64, before: u32) -> bool {
        let place = &self.questions[(piece % QUESTIONS as u64) as usize];
        let (free, asked) = (Ordering::Relaxed, self.age() | State::Asked as u32);
        if place.load(free) != 0 || !self.change(piece, before, State::Asked) {
            return false;
        }
        if place.compare_exchange(0, piece + 1, free, free).is_err() {
            self.change(piece, asked, State::Unknown);
            return false;
        }
        true
    }

    /// Whether there is a question.
    pub(crate) fn is_asked(&self) -> bool {
        self.questions.iter().any(|place| place.load(Ordering::Relaxed) != 0)
    }

    /// Takes the questions that were asked.
    pub(crate) fn questions(&self) -> impl Iterator<Item = u64> + '_ {
        let waiting = self.questions.iter().filter(|place| place.load(Ordering::Relaxed) != 0);
        waiting.filter_map(|place| place.swap(0, Ordering::Relaxed).checked_sub(1))
    }

    /// Answers: `search` says which pages of the piece are there, as many as it has, or nothing.
    /// An answer that was overtaken by a change is dropped. Gives the number of pages found.
    pub(crate) fn answer(&self, piece: u64, search: impl FnOnce() -> Option<Vec<bool>>) -> usize {
        let before = self.pieces[piece as usize].load(Ordering::Relaxed);
        match self.state_of(before) {
            State::Unknown | State::Asked => {}
            State::Empty | State::Searched | State::Full => return 0,
        }
        let Some(found) = search() else {
            self.change(piece, before, State::Empty);
            return 0;
        };
        let count = found.iter().filter(|there| **there).count();
        let state = match count {
            0 => State::Empty,
            count if count == found.len() => State::Full,
            _ => {
                let ones = |bits: &[bool]| {
                    bits.iter().enumerate().fold(0, |word, (n, bit)| word | u64::from(*bit) << n)
                };
                let chunks = found.chunks(64).map(ones).chain(std::iter::repeat(0));
                self.words(piece).iter().zip(chunks).for_each(|(word, bits)| {
                    word.store(bits, Ordering::Relaxed);
                });
                State::Searched
            }
        };
        self.change(piece, before, state);
        count
    }

    /// Notes pages that are there because a request has just read or written them.
    pub(crate) fn add(&self, offset: u64, len: u64) {
        let pages = units(offset, len, PAGE_SHIFT);
        for piece in units(offset, len, PIECE_SHIFT) {
            let before = self.pieces[piece as usize].load(Ordering::Relaxed);
            match self.state_of(before) {
                State::Full => continue,
                // The search will find them.
                State::Unknown | State::Asked => continue,
                State::Empty => {
                    self.words(piece).iter().for_each(|word| word.store(0, Ordering::Relaxed));
                    self.change(piece, before, State::Searched);
                }
                State::Searched => {}
            }
            for page in Self::within(&pages, piece).filter(|page| !self.has_page(*page)) {
                let word = &self.pages[(page / 64) as usize];
                word.fetch_or(1 << (page % 64), Ordering::Relaxed);
            }
        }
    }

    /// Pages that are about to go, or have gone. Call it before and after, because a search that
    /// falls between finds them.
    pub(crate) fn remove(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        let offset = offset.min(end);
        let pages = units(offset, end - offset, PAGE_SHIFT);
        for piece in units(offset, end - offset, PIECE_SHIFT) {
            let word = &self.pieces[piece as usize];
            let within = Self::within(&pages, piece);
            let whole = within.end - within.start == PIECE_PAGES as u64;
            match self.state_of(word.load(Ordering::Relaxed)) {
                State::Empty => {}
                State::Searched if !whole => within.for_each(|page| {
                    let word = &self.pages[(page / 64) as usize];
                    word.fetch_and(!(1 << (page % 64)), Ordering::Relaxed);
                }),
                // An answer that is under way must not count.
                State::Unknown | State::Asked | State::Searched | State::Full => {
                    word.store(0, Ordering::Relaxed);
                }
            }
        }
    }

    /// Takes nothing for granted any more.
    pub(crate) fn forget(&self) {
        let next = |age: u32| Some(age.wrapping_add(FIRST_AGE).max(FIRST_AGE));
        let _ = self.age.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 1 << PAGE_SHIFT;
    const PIECE: u64 = 1 << PIECE_SHIFT;

    /// Answers all questions with what `there` says of each page of the file.
    fn answer(present: &Present, there: impl Fn(u64) -> bool) -> usize {
        let questions: Vec<_> = present.questions().collect();
        for piece in &questions {
            let first = piece * PIECE_PAGES as u64;
            let last = (first + PIECE_PAGES as u64).min(present.len() / PAGE);
            present.answer(*piece, || Some((first..last).map(&there).collect()));
        }
        questions.len()
    }

    #[test]
    fn what_is_not_known_is_asked_for_once_and_answered() {
        let present = Present::new(3 * PIECE + 5 * PAGE, false).unwrap();
        assert_eq!(present.has(0, PAGE), (false, true));
        assert_eq!(present.has(PAGE, PAGE), (false, false), "somebody looks already");
        assert_eq!(present.has(3 * PIECE, 5 * PAGE), (false, true), "the last, which is short");
        assert_eq!(answer(&present, |page| page != 7), 2);
        assert_eq!(present.has(0, 7 * PAGE), (true, false));
        assert_eq!(present.has(0, 8 * PAGE), (false, false));
        assert_eq!(present.state(3), State::Full);
        assert_eq!(present.has(8 * PAGE, PIECE), (false, true), "into the next piece");
    }

    #[test]
    fn pages_that_went_through_a_request_are_there() {
        let present = Present::new(PIECE, false).unwrap();
        present.add(0, PAGE);
        assert!(!present.has(0, PAGE).0, "the search will find it");
        answer(&present, |_| false);
        assert_eq!(present.state(0), State::Empty);
        present.add(PAGE - 1, 2);
        assert!(present.has(0, 2 * PAGE).0 && !present.has(0, 3 * PAGE).0);
        present.remove(PAGE, 1);
        assert!(present.has(0, PAGE).0 && !present.has(PAGE, PAGE).0);
    }

    #[test]
    fn what_is_discarded_during_a_search_is_not_taken_for_there() {
        let present = Present::new(2 * PIECE, false).unwrap();
        for discarded in [0..PAGE, 0..2 * PIECE] {
            present.has(0, PAGE);
            let piece = present.questions().next().unwrap();
            present.answer(piece, || {
                present.remove(discarded.start, discarded.end - discarded.start);
                Some(vec![true; PIECE_PAGES])
            });
            assert_eq!(present.has(0, PAGE), (false, true), "it is asked for again");
            assert_eq!(answer(&present, |_| true), 1);
            assert!(present.has(0, PAGE).0);
            present.remove(0, u64::MAX);
            assert_eq!(present.state(0), State::Unknown);
        }
    }

    #[test]
    fn to_forget_is_one_store_and_what_was_asked_can_be_asked_again() {
        // 16 EiB would take 30 s to walk.
        let present = Present::new(1 << 44, false).unwrap();
        present.has(0, PAGE);
        present.has(PIECE, PAGE);
        answer(&present, |page| page == 0);
        assert!(present.has(0, PAGE).0);
        present.has(2 * PIECE, PAGE);
        present.forget();
        assert_eq!(present.has(0, PAGE), (false, true));
        present.add(PIECE, PAGE);
        assert!(!present.has(PIECE, PAGE).0);
        assert_eq!(answer(&present, |_| true), 3);
        assert_eq!(present.state(2), State::Full);
    }

    #[test]
    fn a_new_file_has_the_pages_that_went_through_requests_and_no_others() {
        let present = Present::new(2 * PIECE, true).unwrap();
        assert_eq!(present.has(0, PAGE), (false, false), "nobody has to look");
        present.add(PAGE, PAGE);
        assert!(present.has(PAGE, PAGE).0 && !present.has(0, 2 * PAGE).0);
        present.remove(0, PIECE);
        assert_eq!(present.has(PAGE, PAGE), (false, false));
        present.add(0, PAGE);
        assert!(present.has(0, PAGE).0 && !present.has(PAGE, PAGE).0);
        // Under memory pressure nothing is known of the others either.
        present.forget();
        assert_eq!(present.has(PIECE, PAGE), (false, true));
    }

    #[test]
    fn more_questions_than_have_room_are_asked_later() {
        let present = Present::new((QUESTIONS as u64 + 1) * PIECE, false).unwrap();
        for piece in 0..QUESTIONS as u64 {
            assert!(present.has(piece * PIECE, PAGE).1);
        }
        assert_eq!(present.has(QUESTIONS as u64 * PIECE, PAGE), (false, false));
        assert_eq!(answer(&present, |_| true), QUESTIONS);
        assert_eq!(present.has(QUESTIONS as u64 * PIECE, PAGE), (false, true));
    }

    #[test]
    fn a_file_that_is_too_large_is_refused() {
        assert!(Present::new(1 << 62, false).is_err());
    }
}
