//! Saved states as files: what goes in comes out, and what is not whole is refused.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use semper_saved::answers::Figures;
use semper_saved::image::Image;
use semper_saved::restore::Saved;
use semper_saved::save::{Order, save};
use semper_saved::{CHUNK, Error, PAGE};
use serde_json::json;
use tempfile::TempDir;

const IMAGE_BLOCKS: usize = 600;

/// A directory with a disk and a memory.
struct Site {
    directory: TempDir,
}

/// A page of noise that is the same for the same number, and different for others.
fn noise(number: u64) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut page);
    page
}

impl Site {
    fn new() -> Self {
        let site = Self { directory: TempDir::new().unwrap() };
        let disk: Vec<u8> = (0..IMAGE_BLOCKS as u64)
            .flat_map(|block| if block % 7 == 3 { [0; PAGE] } else { noise(block) })
            .collect();
        fs::write(site.path("disk"), disk).unwrap();
        fs::write(site.path("state"), b"devices").unwrap();
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn image(&self) -> Image {
        Image::open("root", &self.path("disk")).unwrap()
    }

    fn save(&self, memory: &[u8]) -> Result<Figures, Error> {
        fs::write(self.path("memory"), memory).unwrap();
        let order = Order {
            memory: &self.path("memory"),
            state: &self.path("state"),
            vm: json!({"name": "web"}),
            images: &[self.image()],
            output: &self.path("saved"),
            threads: 2,
        };
        save(&order, &|_| {})
    }

    fn restore(&self) -> Result<Vec<u8>, Error> {
        restore(&self.path("saved"), &self.path("out"), &[self.image()])
    }
}

fn restore(saved: &Path, out: &Path, images: &[Image]) -> Result<Vec<u8>, Error> {
    let saved = Saved::open(saved)?;
    for (image, described) in images.iter().zip(&saved.description.images) {
        image.check(&described.identity)?;
    }
    let memory = File::create(out).unwrap();
    memory.set_len(saved.header.memory).unwrap();
    saved.unpack(&memory, images, 2, &|_| {})?;
    Ok(fs::read(out).unwrap())
}

/// Memory of two chunks whose pages are zeros, blocks, half a block, or noise.
fn memory() -> impl Strategy<Value = Vec<u8>> {
    let page = prop_oneof![
        2 => Just([0; PAGE]),
        4 => (0..IMAGE_BLOCKS as u64).prop_map(noise),
        1 => (0..9u64).prop_map(|n| { let mut page = noise(n); page[9] ^= 1; page }),
        1 => (1000..9999u64).prop_map(noise),
    ];
    let run = (page, 1..40usize).prop_map(|(page, count)| page.repeat(count));
    prop::collection::vec(run, 1..30).prop_map(|runs| {
        let mut memory = runs.concat();
        memory.resize(2 * CHUNK, 0);
        memory
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn what_goes_in_comes_out(memory in memory()) {
        let site = Site::new();
        let figures = site.save(&memory).unwrap();
        let pages = figures.zero_pages + figures.block_pages + figures.data_pages;
        prop_assert_eq!(pages * PAGE as u64, memory.len() as u64);
        prop_assert!(site.restore().unwrap() == memory);
        let saved = Saved::open(&site.path("saved")).unwrap();
        prop_assert_eq!(saved.state, b"devices");
        prop_assert_eq!(saved.description.vm, json!({"name": "web"}));
    }
}

fn full() -> Vec<u8> {
    (0..4 * CHUNK / PAGE)
        .flat_map(|n| noise(if n % 9 == 0 { 5000 } else { 0 } + n as u64))
        .collect()
}

#[test]
fn blocks_are_named_and_not_held() {
    let site = Site::new();
    let figures = site.save(&full()).unwrap();
    assert!(figures.block_pages > 380, "{figures:?}");
    let held = figures.data_pages * PAGE as u64;
    assert!(figures.file < held + held / 50 + 8192, "{figures:?}");
}

#[test]
fn every_byte_that_is_changed_is_noticed() {
    let site = Site::new();
    let memory = full();
    site.save(&memory).unwrap();
    let whole = fs::read(site.path("saved")).unwrap();
    let step = (whole.len() / 300).max(1);
    // All of the header and the description, and places everywhere else.
    for at in (0..200).chain((200..whole.len()).step_by(step)) {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        fs::write(site.path("saved"), &damaged).unwrap();
        assert!(site.restore().is_err(), "byte {at}");
    }
    for length in (0..200).chain((200..whole.len()).step_by(step)) {
        fs::write(site.path("saved"), &whole[..length]).unwrap();
        let error = site.restore().unwrap_err();
        let told = matches!(error, Error::Truncated(_) | Error::Foreign);
        assert!(told, "{length}: {error}");
    }
    fs::write(site.path("saved"), [&whole[..], b"x"].concat()).unwrap();
    assert!(matches!(site.restore(), Err(Error::Corrupt(_))));
    fs::write(site.path("saved"), &whole).unwrap();
    assert!(site.restore().unwrap() == memory);
}

#[test]
fn a_later_version_is_told_from_damage() {
    let site = Site::new();
    site.save(&full()).unwrap();
    let file = OpenOptions::new().write(true).open(site.path("saved")).unwrap();
    file.write_all_at(&7u16.to_le_bytes(), 8).unwrap();
    assert!(matches!(site.restore(), Err(Error::Version(7))));
}

#[test]
fn a_disk_in_another_state_is_refused() {
    let site = Site::new();
    let memory = full();
    site.save(&memory).unwrap();
    // A copy is the same state, whatever its times are.
    fs::copy(site.path("disk"), site.path("copy")).unwrap();
    let copy = Image::open("root", &site.path("copy")).unwrap();
    assert!(restore(&site.path("saved"), &site.path("out"), &[copy]).unwrap() == memory);
    // Its last byte is in no page of this memory.
    let disk = OpenOptions::new().write(true).open(site.path("copy")).unwrap();
    disk.write_all_at(b"x", (IMAGE_BLOCKS * PAGE - 1) as u64).unwrap();
    let copy = Image::open("root", &site.path("copy")).unwrap();
    let error = restore(&site.path("saved"), &site.path("out"), &[copy]).unwrap_err();
    assert!(matches!(error, Error::Disk { .. }), "{error}");
    fs::OpenOptions::new().append(true).open(site.path("disk")).unwrap().set_len(4096).unwrap();
    assert!(matches!(site.restore(), Err(Error::Disk { .. })));
}

#[test]
fn a_block_that_changes_after_the_check_is_noticed() {
    let site = Site::new();
    site.save(&full()).unwrap();
    let saved = Saved::open(&site.path("saved")).unwrap();
    let image = site.image();
    image.check(&saved.description.images[0].identity).unwrap();
    let disk = OpenOptions::new().write(true).open(site.path("disk")).unwrap();
    disk.write_all_at(b"x", 11 * PAGE as u64).unwrap();
    let memory = File::create(site.path("out")).unwrap();
    let error = saved.unpack(&memory, &[image], 2, &|_| {}).unwrap_err();
    assert!(matches!(error, Error::Corrupt(_)), "{error}");
}

#[test]
fn nothing_is_left_of_a_save_that_fails() {
    let site = Site::new();
    let before = site.save(&full()).unwrap().file;
    fs::remove_file(site.path("state")).unwrap();
    assert!(site.save(&full()).is_err());
    assert_eq!(fs::metadata(site.path("saved")).unwrap().len(), before, "the former one stays");
    let left = fs::read_dir(site.directory.path()).unwrap();
    assert!(
        left.into_iter()
            .all(|entry| { !entry.unwrap().file_name().to_string_lossy().ends_with(".part") })
    );
}
