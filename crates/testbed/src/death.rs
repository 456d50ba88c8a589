//! The death of a process, at any instant.
//!
//! What a dead process leaves is what stands in memory and on the disk at that instant, and what
//! the kernel still makes of its I/O. So nothing has to be killed: the world is copied as it is,
//! with every outcome of the I/O, and the process goes on to its next possible death.

use crate::choices::Choices;
use crate::fingerprint::Fingerprint;
use crate::world::{KernelIo, World};

impl World {
    /// Remembers every world that the process would leave if it died now; gives their number.
    pub fn die(&mut self) -> u64 {
        // On the path of an earlier run the dead were buried then.
        if self.deaths_left == 0 || !self.choices.is_new_ground() {
            return 0;
        }
        self.deaths_left -= 1;
        let kernel = std::mem::take(&mut self.kernel);
        let deaths = if self.haunted {
            let ghosts = self.ghosts.clone();
            self.ghosts.extend(kernel.iter().cloned());
            self.bury();
            self.ghosts = ghosts;
            1
        } else {
            self.bury_with_every_outcome(&kernel)
        };
        self.kernel = kernel;
        self.deaths_left += 1;
        deaths
    }

    fn bury(&mut self) {
        let mut state = Fingerprint::new();
        self.fingerprint(&mut state);
        if self.graves.insert(state.value()) {
            let snapshot = self.snapshot();
            self.unexplored.push(snapshot);
        }
    }

    /// Each request in the kernel is carried out, or in part, or not at all, and never later: the
    /// next process waits until the image lock is free.
    fn bury_with_every_outcome(&mut self, kernel: &[KernelIo]) -> u64 {
        let (disk, mut outcomes, mut count) = (self.disk, Choices::new(), 0);
        let buffers: Vec<_> = kernel.iter().map(KernelIo::buffer).collect();
        let conflict = kernel.iter().any(|a| kernel.iter().any(|b| a.conflicts_with(b)));
        loop {
            if conflict {
                self.carry_out_some_in_any_order(kernel.to_vec(), &mut outcomes);
            } else {
                self.carry_out_some(kernel.to_vec(), &mut outcomes);
            }
            self.bury();
            count += 1;
            self.disk = disk;
            kernel.iter().zip(&buffers).for_each(|(io, bytes)| io.set_buffer(bytes));
            if !outcomes.advance() {
                return count;
            }
        }
    }

    fn carry_out_some(&mut self, mut kernel: Vec<KernelIo>, outcomes: &mut Choices) {
        for io in kernel.iter_mut().filter(|io| io.done == 0) {
            if !self.tearing {
                if outcomes.choose(2) == 1 {
                    io.finish(&mut self.disk);
                }
                continue;
            }
            for block in 0..io.request.count {
                if outcomes.choose(2) == 1 {
                    io.carry_out(block, &mut self.disk);
                }
            }
        }
    }

    /// Only a faulty backend gets here: the order of the requests matters, so any order.
    fn carry_out_some_in_any_order(&mut self, mut kernel: Vec<KernelIo>, outcomes: &mut Choices) {
        kernel.retain(|io| io.done == 0);
        while !kernel.is_empty() {
            match outcomes.choose(kernel.len() + 1) {
                0 => return,
                n => kernel.remove(n - 1).finish(&mut self.disk),
            }
        }
    }
}
