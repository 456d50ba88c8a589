//! Layers merged into the image of a disk that nobody serves, also the last one.
//!
//! ```text
//!   lock ─► claim ─► walls ─► the highest layer is sealed ─► layer after layer into the image ─► release
//! ```
//!
//! What was begun and ended early is done again: the record says how far the merge is, and until a layer
//! is dropped from it the layer covers what the image has. On stdout is a line
//! `{"layer":…,"done":…,"total":…}` (bytes) now and then, and `{"merged":[…],"layers":…}` at the end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use semper_block::{Image, OpenOptions};
use semper_epoch::new_id;
use semper_layers::BLOCK;
use semper_layers::chain::Current;
use semper_layers::disk::Disk;
use semper_layers::keeper::{Keeper, Shorten};
use semper_layers::plan::Act;
use semper_layers::record::{LayerId, NOBODY};
use semper_title::Title;
use serde_json::json;

use crate::args::Args;
use crate::crash;
use crate::failure::{Failure, system};
use crate::serve::title_of;
use crate::walls;

const TELL_EVERY: Duration = Duration::from_millis(200);

/// Merges what `how` says of the layers of the image that `args` name.
pub(crate) fn run(args: &Args, how: Shorten) -> Result<(), Failure> {
    let path = args.blk_file.as_deref().ok_or_else(|| {
        Failure::Usage("no image was given; name one with --blk-file=IMAGE".to_owned())
    })?;
    let image = Image::open(path, OpenOptions::default()).map_err(Failure::Image)?;
    image.try_lock().map_err(Failure::Lock)?;
    let title = title_of(args);
    if title.is_awaited() {
        return Err(Failure::Usage("no claim was given; name it with --epoch".to_owned()));
    }
    title.admit(&image).map_err(Failure::Denied)?;
    image.refresh_size().map_err(Failure::Image)?;
    let image = Arc::new(image);
    walls::raise(args, &image);
    let merged = merge(args, how, &image, &title);
    title.release();
    println!("{}", merged?);
    Ok(())
}

fn merge(
    args: &Args,
    how: Shorten,
    image: &Arc<Image>,
    title: &Title,
) -> Result<serde_json::Value, Failure> {
    let total = image.capacity();
    let is_file = image.file().metadata().is_ok_and(|metadata| metadata.is_file());
    if !is_file {
        return Ok(json!({"merged": [], "layers": 0}));
    }
    let files = Disk::new(image, false, args.layer_map.clone(), args.epoch_file.clone());
    let files = Arc::new(files.map_err(system("look for the layers of the image"))?);
    let id = new_id().map_err(system("draw an id for the layers"))?;
    let claim = title.claim().unwrap_or(NOBODY);
    let keeper = Keeper::open(files, claim, Arc::<Current>::default(), (total, id));
    let mut keeper = keeper.map_err(Failure::Layers)?;
    let mut told = Instant::now();
    let mut tell = |act: Act, layer: LayerId, blocks: u64| {
        crash::after(act.name());
        if act == Act::Copy && told.elapsed() >= TELL_EVERY {
            let done = (blocks * BLOCK).min(total);
            println!("{}", json!({"layer": layer, "done": done, "total": total}));
            told = Instant::now();
        }
    };
    let merged = keeper.shorten(how, total, &mut tell).map_err(Failure::Layers)?;
    Ok(json!({"merged": merged, "layers": keeper.record().chain().len()}))
}
