//! Every life of every process that can follow another one.

use std::cell::RefCell;
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use semper_inflight::Point;
use semper_testbed::{Choices, Snapshot, Violation, World};

use crate::device::{Device, Life};
use crate::scenario::{Promise, Scenario};

/// What was explored.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Distinct states at a decision of the device.
    pub states: usize,
    /// Distinct worlds that a dead process has left to the next one.
    pub graves: usize,
    /// Runs of a process, from its start to its end or to a known state.
    pub runs: u64,
    /// Histories that came to their end and were judged.
    pub judged: u64,
    /// How many deaths were looked at, for each point.
    pub deaths: [u64; Point::ALL.len()],
}

/// Explores `scenario`.
///
/// # Errors
/// The first broken promise.
pub fn explore(scenario: &Scenario) -> Result<Report, String> {
    let world = World::new(&scenario.setup);
    let start = world.snapshot();
    let mut explorer = Explorer {
        scenario,
        world: Rc::new(RefCell::new(world)),
        known: HashSet::new(),
        report: Report::default(),
    };
    explorer.follow(&start)?;
    let mut report = explorer.report;
    report.states = explorer.known.len();
    report.graves = explorer.world.borrow().graves.len();
    report.deaths = explorer.world.borrow().deaths;
    Ok(report)
}

struct Explorer<'a> {
    scenario: &'a Scenario,
    world: Rc<RefCell<World>>,
    known: HashSet<u128>,
    report: Report,
}

impl Explorer<'_> {
    /// Explores every life of the process that starts from `start`, and of all after it.
    fn follow(&mut self, start: &Snapshot) -> Result<(), String> {
        let mut choices = Choices::new();
        loop {
            {
                let mut world = self.world.borrow_mut();
                world.restore(start);
                world.choices = choices;
            }
            self.live()?;
            let unexplored = {
                let mut world = self.world.borrow_mut();
                choices = std::mem::take(&mut world.choices);
                std::mem::take(&mut world.unexplored)
            };
            for grave in &unexplored {
                self.follow(grave)?;
            }
            if !choices.advance() {
                return Ok(());
            }
        }
    }

    /// One life, until nothing is left to do or the rest is known.
    fn live(&mut self) -> Result<(), String> {
        self.report.runs += 1;
        let (world, scenario, known) = (&self.world, self.scenario, &mut self.known);
        let life = catch_unwind(AssertUnwindSafe(|| {
            Device::start(world, scenario).live(|state| !known.insert(state))
        }));
        match life.map_err(|payload| payload.downcast::<Violation>()) {
            Ok(Life::Known) => Ok(()),
            Ok(Life::Done) => self.judge(),
            Err(Ok(violation)) => Err(violation.0),
            // A failed assertion of the code under test, or of the model.
            Err(Err(payload)) => resume_unwind(payload),
        }
    }

    fn judge(&mut self) -> Result<(), String> {
        self.report.judged += 1;
        let wrong = self.world.borrow().judge(self.scenario.promise == Promise::WritesInOrder);
        wrong.map_or(Ok(()), Err)
    }
}

impl Report {
    /// Adds another report.
    pub fn add(&mut self, other: &Report) {
        self.states += other.states;
        self.graves += other.graves;
        self.runs += other.runs;
        self.judged += other.judged;
        self.deaths.iter_mut().zip(other.deaths).for_each(|(sum, n)| *sum += n);
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} states, {} worlds left by the dead, {} lives, {} deaths at points, {} ends judged",
            self.states,
            self.graves,
            self.runs,
            self.deaths.iter().sum::<u64>(),
            self.judged
        )
    }
}
