//! In which order a snapshot is taken and a layer is merged. Pure: an event in, what to do out.
//!
//! ```text
//!   snapshot  begin record ─ mark image ─ make files ─ flush names ─ enter opened ─ flush record ─ switch ─┐
//!   seal   ┌───────────────────────────────────────────────────────────────────────────────────────────────┘
//!          └─ look at maps ─ flush image ─ flush data ─ write maps ─ flush maps ─ enter sealed ─ flush record
//!   merge     enter merging ─ flush record ─ copy ─ flush image ─ enter dropped ─ flush record ─ unchain ─
//!             remove files ─ enter gone ─ flush record
//!   fold      as a merge
//!   lift      copy up ─ flush top ─ enter lifted ─ flush record ─ unchain ─ remove lifted
//! ```
//!
//! A process can die before and after each [`Act`]; what the next one finds is enough:
//!
//! | death | what the next process finds | what it does |
//! |---|---|---|
//! | before *enter opened* | perhaps files that no record names | removes them |
//! | up to *enter sealed* | the new layer, opened: writes go there, and no snapshot was told | seals it as lapsed |
//! | in a merge up to *enter dropped* | the layer, merging, above what was copied: the same content | copies again |
//! | after it | files that the record keeps for nobody | removes them |
//! | in a lift up to *enter lifted* | blocks in the highest layer that the one below has as well | copies the others |
//! | after it | files that no record names | removes them |
//!
//! An act that fails ends the plan; what was entered stays, as after a death.

use crate::mistake::{Mistake, made};

/// What is to be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aim {
    /// A layer above all others, and a snapshot below it.
    Snapshot,
    /// A layer above those that another epoch has left; nobody is told of a snapshot.
    Extend,
    /// What lies below the highest layer is on the medium.
    Seal,
    /// One layer less: the lowest.
    Merge,
    /// One layer less: that below the highest, whose blocks go up into the highest. The layers under them
    /// are wanted, so that it cannot go down.
    Lift,
    /// No layer any more: the only one goes into the image, of a disk that nobody serves.
    Fold,
}

/// One thing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// The record without layers, and its name, on the medium; if there is none yet.
    BeginRecord,
    /// From now on programs that know no layers refuse the image.
    MarkImage,
    /// The new layer's files, with their headers, on the medium.
    MakeFiles,
    /// Their names.
    FlushNames,
    /// The record names the new layer.
    EnterOpened,
    /// What was entered is on the medium.
    FlushRecord,
    /// Requests go to the new layer. No request is in flight.
    Switch,
    /// What is to be written of the maps below is known now.
    LookAtMaps,
    /// The image is on the medium.
    FlushImage,
    /// The blocks of the layers below are.
    FlushData,
    /// What was looked at is written.
    WriteMaps,
    /// It is on the medium.
    FlushMaps,
    /// The record says that the snapshot is there.
    EnterSealed,
    /// The record says that there is no snapshot below the lowest layer any more.
    EnterMerging,
    /// A part of the layer's blocks is in the image.
    Copy,
    /// The record says that the layer is not read any more.
    EnterDropped,
    /// Requests do without it.
    Unchain,
    /// Its files are removed, unless somebody may have them open.
    RemoveFiles,
    /// The record does not name it any more.
    EnterGone,
    /// Some of the blocks of the layer below the highest are in the highest.
    CopyUp,
    /// The highest layer is on the medium.
    FlushTop,
    /// The record does not name the layer below any more.
    EnterLifted,
    /// Its files are removed.
    RemoveLifted,
}

const OPEN: [Act; 7] = [
    Act::BeginRecord,
    Act::MarkImage,
    Act::MakeFiles,
    Act::FlushNames,
    Act::EnterOpened,
    Act::FlushRecord,
    Act::Switch,
];
const SEAL: [Act; 7] = [
    Act::LookAtMaps,
    Act::FlushImage,
    Act::FlushData,
    Act::WriteMaps,
    Act::FlushMaps,
    Act::EnterSealed,
    Act::FlushRecord,
];
const MERGE: [Act; 10] = [
    Act::EnterMerging,
    Act::FlushRecord,
    Act::Copy,
    Act::FlushImage,
    Act::EnterDropped,
    Act::FlushRecord,
    Act::Unchain,
    Act::RemoveFiles,
    Act::EnterGone,
    Act::FlushRecord,
];

const LIFT: [Act; 6] = [
    Act::CopyUp,
    Act::FlushTop,
    Act::EnterLifted,
    Act::FlushRecord,
    Act::Unchain,
    Act::RemoveLifted,
];

impl Act {
    /// In statuses and logs, and where a test has a process die.
    pub fn name(self) -> &'static str {
        match self {
            Self::BeginRecord => "begin-record",
            Self::MarkImage => "mark-image",
            Self::MakeFiles => "make-files",
            Self::FlushNames => "flush-names",
            Self::EnterOpened => "enter-opened",
            Self::FlushRecord => "flush-record",
            Self::Switch => "switch",
            Self::LookAtMaps => "look-at-maps",
            Self::FlushImage => "flush-image",
            Self::FlushData => "flush-data",
            Self::WriteMaps => "write-maps",
            Self::FlushMaps => "flush-maps",
            Self::EnterSealed => "enter-sealed",
            Self::EnterMerging => "enter-merging",
            Self::Copy => "copy",
            Self::EnterDropped => "enter-dropped",
            Self::Unchain => "unchain",
            Self::RemoveFiles => "remove-files",
            Self::EnterGone => "enter-gone",
            Self::CopyUp => "copy-up",
            Self::FlushTop => "flush-top",
            Self::EnterLifted => "enter-lifted",
            Self::RemoveLifted => "remove-lifted",
        }
    }
}

/// What has become of an act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is done.
    Done,
    /// A part of it is.
    Part,
    /// It failed.
    Failed,
}

/// How far a plan has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What it is for.
    pub aim: Aim,
    /// The act that is next; beyond the last one when it is over.
    at: usize,
}

impl Plan {
    /// The beginning.
    pub fn new(aim: Aim) -> Self {
        Self { aim, at: 0 }
    }

    fn acts(self) -> impl Iterator<Item = Act> {
        let (open, seal, merge): (&[Act], &[Act], &[Act]) = match self.aim {
            Aim::Snapshot | Aim::Extend => (&OPEN, &SEAL, &[]),
            Aim::Seal => (&[], &SEAL, &[]),
            Aim::Merge | Aim::Fold => (&[], &[], &MERGE),
            Aim::Lift => (&[], &[], &LIFT),
        };
        let open = wrong_order(open);
        let flushes =
            [Act::LookAtMaps, Act::FlushImage, Act::FlushData, Act::WriteMaps, Act::FlushMaps];
        let seal =
            seal.iter().filter(move |act| !(made(Mistake::SealUnflushed) && flushes.contains(act)));
        let merge =
            merge.iter().filter(|act| !(made(Mistake::DropUnflushed) && **act == Act::FlushImage));
        open.into_iter().chain(seal.copied()).chain(merge.copied())
    }

    /// What is to be done now; nothing when it is over.
    pub fn act(self) -> Option<Act> {
        self.acts().nth(self.at)
    }

    /// Goes on after an act.
    pub fn after(self, event: Event) -> Self {
        match event {
            Event::Part => self,
            Event::Done => Self { at: self.at + 1, ..self },
            Event::Failed => Self { at: usize::MAX, ..self },
        }
    }

    /// Whether requests go to the new layer already.
    pub fn has_switched(self) -> bool {
        !self.acts().skip(self.at).any(|act| act == Act::Switch)
    }
}

fn wrong_order(open: &[Act]) -> Vec<Act> {
    let mut open = open.to_vec();
    if made(Mistake::SwitchFirst) && !open.is_empty() {
        open.pop();
        open.insert(4, Act::Switch);
    }
    open
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acts(aim: Aim) -> Vec<Act> {
        let mut plan = Plan::new(aim);
        let mut acts = Vec::new();
        while let Some(act) = plan.act() {
            acts.push(act);
            plan = plan.after(Event::Done);
        }
        acts
    }

    fn place(acts: &[Act], act: Act) -> usize {
        acts.iter().position(|known| *known == act).unwrap()
    }

    #[test]
    fn what_has_to_be_durable_comes_first() {
        let acts = acts(Aim::Snapshot);
        let order = [
            Act::MakeFiles,
            Act::FlushNames,
            Act::EnterOpened,
            Act::FlushRecord,
            Act::Switch,
            Act::LookAtMaps,
            Act::FlushData,
            Act::WriteMaps,
            Act::FlushMaps,
            Act::EnterSealed,
        ];
        assert!(order.map(|act| place(&acts, act)).is_sorted());
        assert_eq!(acts.last(), Some(&Act::FlushRecord));
    }

    #[test]
    fn an_act_in_parts_is_done_again_and_a_failure_ends_it() {
        let mut plan = Plan::new(Aim::Merge).after(Event::Done).after(Event::Done);
        assert_eq!(plan.after(Event::Part).act(), Some(Act::Copy));
        plan = plan.after(Event::Failed);
        assert_eq!(plan.act(), None);
        assert_eq!(plan.after(Event::Part).act(), None);
    }

    #[test]
    fn a_plan_knows_whether_it_has_switched() {
        let mut plan = Plan::new(Aim::Snapshot);
        while plan.act() != Some(Act::Switch) {
            assert!(!plan.has_switched());
            plan = plan.after(Event::Done);
        }
        assert!(!plan.has_switched() && plan.after(Event::Done).has_switched());
    }
}
