//! Where a device stands in its queues: decided by what is in memory, and by nothing else.
//!
//! No register tells it, and none sets it. But a completion queue shows it: its entries have the phase of
//! the round in which they were written, and the last one says how far commands were fetched.
//!
//! ```text
//!   phase  1 1 1 1 1 0 0 0        c = 5: so many completions, or 16, 32, … more
//!                  └ the last: commands up to `head` were fetched      (M = 8 entries, 2M = 16)
//! ```
//!
//! To bring another device there, it is given `k` commands that do nothing, with k = c modulo 2M and
//! k = head modulo N ([`commands_to`]).

use semper_nvme::spec::CQE;

/// A completion queue of `size` entries, as a device has left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Completions, modulo 2 * size.
    pub completed: u32,
    /// The command queue and its head, as the last completion has them; none was ever written.
    pub last: Option<(u16, u32)>,
}

/// Phase, queue and head of an entry.
fn entry(bytes: &[u8]) -> (bool, u16, u32) {
    let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    (half(14) & 1 != 0, half(10), half(8).into())
}

/// Where a device stands in a completion queue with these bytes.
pub fn position(ring: &[u8]) -> Position {
    let entries: Vec<_> = ring.chunks_exact(CQE as usize).map(entry).collect();
    let size = entries.len();
    let Some((first, ..)) = entries.first().copied() else {
        return Position { completed: 0, last: None };
    };
    let tail = entries.iter().position(|(phase, ..)| *phase != first).unwrap_or(size);
    let completed = if first { tail } else { (size + tail) % (2 * size) };
    let (_, queue, head) = entries[tail - 1];
    // A queue that nobody has written yet is zeros, and no I/O queue has that number.
    let virgin = !first && tail == size && queue == 0;
    Position { completed: completed as u32, last: (!virgin).then_some((queue, head)) }
}

/// How many commands bring a new pair of queues to where another stands: `completed` modulo twice
/// `completions` (its entries), and `fetched` modulo `submissions`. `None`: no number does.
pub fn commands_to(
    (completed, completions): (u32, u32),
    (fetched, submissions): (u32, u32),
    least: u32,
) -> Option<u32> {
    let period = 2 * completions;
    if period == 0 || submissions == 0 || period % submissions != 0 {
        return None;
    }
    // One period has every remainder of the shorter queue.
    let found = (completed % submissions == fetched % submissions).then_some(completed)?;
    (0..).map(|round| found + round * period).find(|commands| *commands >= least)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a device leaves after so many completions, each of which says that all were fetched.
    fn ring(size: u32, completions: u32, submissions: u32) -> Vec<u8> {
        let mut ring = vec![0; (size * 16) as usize];
        for n in 0..completions {
            let at = (n % size * 16) as usize;
            let head = ((n + 1) % submissions) as u16;
            ring[at + 8..at + 10].copy_from_slice(&head.to_le_bytes());
            ring[at + 10..at + 12].copy_from_slice(&3u16.to_le_bytes());
            ring[at + 14] = u8::from(n / size % 2 == 0);
        }
        ring
    }

    #[test]
    fn every_position_is_found_and_reached_again() {
        for (size, submissions) in [(8, 8), (8, 4), (8, 16), (2, 2), (3, 3)] {
            for completions in 0..5 * size {
                let found = position(&ring(size, completions, submissions));
                assert_eq!(found.completed, completions % (2 * size), "{size} {completions}");
                let head = (completions > 0).then_some((3, completions % submissions));
                assert_eq!(found.last, head, "{size} {completions}");
                let fetched = found.last.map_or(0, |(_, head)| head);
                let k = commands_to((found.completed, size), (fetched, submissions), 0).unwrap();
                let again = position(&ring(size, k, submissions));
                assert_eq!(again.completed, found.completed);
                assert_eq!(again.last.map_or(0, |(_, head)| head), fetched);
            }
        }
    }

    #[test]
    fn a_command_that_was_fetched_and_has_not_ended_has_no_number() {
        assert_eq!(commands_to((3, 8), (4, 8), 0), None);
        assert_eq!(commands_to((3, 8), (3, 8), 4), Some(19));
        // Where the queues' sizes have nothing to do with each other it cannot be told.
        assert_eq!(commands_to((3, 8), (3, 7), 0), None);
        assert_eq!(commands_to((0, 0), (0, 0), 0), None);
    }
}
