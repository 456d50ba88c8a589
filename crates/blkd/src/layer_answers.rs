//! What the commands of snapshots tell, as JSON: docs/design/snapshots.md. The version rule is that of
//! `answers`.

use serde::Serialize;

/// `snapshot`.
#[derive(Debug, Serialize)]
pub(crate) struct Snapshot {
    pub snapshot: u64,
    /// "opened", or "sealed" for who has waited.
    pub state: &'static str,
    /// From the last request to the next.
    pub pause_us: u64,
}

/// `layers`.
#[derive(Debug, Serialize)]
pub(crate) struct Layers {
    /// The lowest first.
    pub layers: Vec<Layer>,
    /// Merged, and kept for readers.
    pub kept: usize,
    /// Most layers of a chain.
    pub limit: usize,
    /// What the maps take of memory.
    pub map_bytes: u64,
    pub pins: Vec<Pin>,
    pub task: Option<LayerTask>,
    /// Why the last task ended early.
    pub last_error: Option<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Layer {
    pub id: u64,
    /// The name of a [`semper_layers::record::State`].
    pub state: &'static str,
    pub epoch: u64,
    /// Seconds since 1970.
    pub time: u64,
    pub frozen: bool,
    pub size_bytes: u64,
    pub data_bytes: u64,
    /// It takes the guest's writes.
    pub writes: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct Pin {
    pub snapshot: u64,
    pub reader: String,
}

/// A snapshot or a merge under way.
#[derive(Debug, Serialize)]
pub(crate) struct LayerTask {
    /// "snapshot" or "merge".
    pub kind: &'static str,
    pub layer: u64,
    pub step: &'static str,
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// `merge`.
#[derive(Debug, Serialize)]
pub(crate) struct Merging {
    pub merging: Vec<u64>,
}

/// `pin`, `unpin`.
#[derive(Debug, Serialize)]
pub(crate) struct Pins {
    pub pins: Vec<Pin>,
}

/// `undo`.
#[derive(Debug, Serialize)]
pub(crate) struct Undone {
    /// As if it had never been. If not, the layer stays until it is merged.
    pub taken_back: bool,
}

/// `quiesce`.
#[derive(Debug, Serialize)]
pub(crate) struct Quiesced {
    pub quiesced: bool,
    pub for_ms: u64,
}

/// `resume`.
#[derive(Debug, Serialize)]
pub(crate) struct Resumed {
    /// The queues stood still until now.
    pub held: bool,
}

#[cfg(test)]
mod tests {
    use semper_control::Answer;
    use semper_control::golden::check;
    use serde_json::json;

    use super::*;

    fn told(name: &str, answer: impl Serialize) {
        check(name, &Answer::ok(&json!(1), answer).line);
    }

    #[test]
    fn answers_are_complete() {
        told("blkd-snapshot", Snapshot { snapshot: 3, state: "opened", pause_us: 1830 });
        let layer = || Layer {
            id: 2,
            state: "sealed",
            epoch: 7,
            time: 1_700_000_000,
            frozen: false,
            size_bytes: 1 << 30,
            data_bytes: 4096,
            writes: true,
        };
        let pins = || vec![Pin { snapshot: 2, reader: "bonn".to_owned() }];
        let layers = || Layers {
            layers: vec![layer()],
            kept: 0,
            limit: 4,
            map_bytes: 4096,
            pins: pins(),
            task: None,
            last_error: None,
        };
        told("blkd-layers", layers());
        let (kind, step) = ("merge", "copy");
        let task = LayerTask { kind, layer: 1, step, done_bytes: 0, total_bytes: 4096 };
        told("blkd-layers-merging", Layers { task: Some(task), ..layers() });
        told("blkd-layers-failed", Layers { last_error: Some(String::new()), ..layers() });
        told("blkd-merge", Merging { merging: vec![1, 2] });
        told("blkd-pin", Pins { pins: pins() });
        told("blkd-undo", Undone { taken_back: true });
        told("blkd-quiesce", Quiesced { quiesced: true, for_ms: 2000 });
        told("blkd-resume", Resumed { held: true });
    }
}
