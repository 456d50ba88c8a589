//! Every path through a test that has to make decisions, one path for each run.

/// The decisions of one run, and the way to the next run.
///
/// A run asks [`Choices::choose`] at each decision. The first run is given 0 everywhere;
/// [`Choices::advance`] then changes the last decision that has an alternative left. Runs must be
/// deterministic between their decisions.
#[derive(Clone, Debug, Default)]
pub struct Choices {
    made: Vec<(u32, u32)>,
    at: usize,
}

impl Choices {
    /// Before the first run.
    pub fn new() -> Self {
        Self::default()
    }

    /// Chooses one of `options` (at least 1), by number.
    ///
    /// # Panics
    /// When a run that follows an earlier one does not come to the same decision again.
    pub fn choose(&mut self, options: usize) -> usize {
        if options == 1 {
            return 0;
        }
        if self.at == self.made.len() {
            self.made.push((0, options as u32));
        }
        let (taken, of) = self.made[self.at];
        assert_eq!(of as usize, options, "the run is not deterministic");
        self.at += 1;
        taken as usize
    }

    /// Whether the run has left the path of the run before it.
    pub fn is_new_ground(&self) -> bool {
        self.at == self.made.len()
    }

    /// Prepares the next run; false when all paths were taken.
    pub fn advance(&mut self) -> bool {
        // Decisions that this run did not come to (it was cut short) are no decisions.
        self.made.truncate(self.at);
        self.at = 0;
        while let Some((taken, of)) = self.made.pop() {
            if taken + 1 < of {
                self.made.push((taken + 1, of));
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::Choices;

    #[test]
    fn all_paths_are_taken_once() {
        let (mut choices, mut paths) = (Choices::new(), Vec::new());
        loop {
            let first = choices.choose(2);
            let second = if first == 0 { choices.choose(3) } else { 9 };
            paths.push((first, second));
            if !choices.advance() {
                break;
            }
        }
        assert_eq!(paths, [(0, 0), (0, 1), (0, 2), (1, 9)]);
    }
}
