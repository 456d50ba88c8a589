//! The page/block map through the control socket. What it finds in a real guest is tested in
//! `tests/integration/test_block_map.py`.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use semper_blockmap::format::Export;
use semper_blockmap::{Page, hash_page};
use serde_json::{Value, json};

use crate::backend::{Backend, ENGINES, Site, wait_until};
use crate::machine::{Ask, Machine, T_DISCARD, Waited};

fn map(backend: &Backend) -> Value {
    backend.control(&json!({"id": 1, "cmd": "map"}))["ok"].clone()
}

/// An answer and the bytes behind it.
fn fetch(backend: &Backend, request: &Value) -> (Value, Vec<u8>) {
    let mut stream = UnixStream::connect(backend.control_path()).unwrap();
    stream.write_all(format!("{request}\n").as_bytes()).unwrap();
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let answer: Value = serde_json::from_str(&line).unwrap();
    let mut bytes = vec![0; answer["ok"]["bytes"].as_u64().unwrap() as usize];
    reader.read_exact(&mut bytes).unwrap();
    (answer["ok"].clone(), bytes)
}

fn export(backend: &Backend) -> Export {
    Export::parse(&fetch(backend, &json!({"cmd": "map-export"})).1).unwrap()
}

/// Blocks and their stamps, and how many of them stand in pages.
fn blocks(backend: &Backend, limit: Option<u64>) -> (Vec<(u64, u64)>, u64) {
    let (told, bytes) = fetch(backend, &json!({"cmd": "map-blocks", "limit": limit}));
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    let pairs = bytes.chunks_exact(16).map(|b| (number(&b[..8]), number(&b[8..])));
    (pairs.collect(), told["held"].as_u64().unwrap())
}

#[test]
fn touched_blocks_are_named_with_stamps_that_change_when_they_are_written() {
    let site = Site::new(1 << 20);
    let backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    for block in [3u64, 77, 200] {
        assert_eq!(machine.ask(&backend, &Ask::read(block * 8, 4096)).status, 0);
    }
    let (before, held) = blocks(&backend, None);
    let mut named: Vec<u64> = before.iter().map(|&(block, _)| block).collect();
    named.sort_unstable();
    assert_eq!((named, held <= 3), (vec![3, 77, 200], true));
    assert_eq!(machine.ask(&backend, &Ask::write(77 * 8, vec![7; 4096])).status, 0);
    let (after, _) = blocks(&backend, None);
    let stamp = |of: &[(u64, u64)], wanted| of.iter().find(|(block, _)| *block == wanted).copied();
    assert_ne!(stamp(&before, 77), stamp(&after, 77));
    assert_eq!(stamp(&before, 200), stamp(&after, 200));
    assert_eq!(blocks(&backend, Some(2)).0.len(), 2);
    // What another host's guest has used, and what no disk has.
    let runs = json!([[10, 2], [255, 9], [1u64 << 60, u64::MAX]]);
    backend.control(&json!({"cmd": "map-touch", "runs": runs}));
    assert_eq!(map(&backend)["touched"], json!(6));
}

/// Every block of the export is what stands in the image.
fn blocks_are_true(site: &Site, export: &Export) {
    let image = std::fs::read(&site.image).unwrap();
    for block in &export.blocks {
        let mut page = Page::default();
        page.0.copy_from_slice(&image[block.block as usize * 4096..][..4096]);
        assert_eq!(hash_page(&export.key, &page), block.hash, "block {}", block.block);
    }
}

#[test]
fn no_write_is_left_in_flight_by_queues_that_move() {
    for &engine in ENGINES {
        let site = Site::new(4 << 20);
        let backend = site.start(&["--num-queues=4", engine]);
        let mut machine = Machine::new(4, 64);
        machine.connect(&site.socket()).unwrap();
        let maps: [&[u16]; 4] = [&[0, 1, 2, 3], &[0; 4], &[0, 0, 0, 1], &[0; 4]];
        for round in 0..40u64 {
            for queue in 0..4u64 {
                for n in 0..8 {
                    // All queues write the same blocks, and neighbouring parts of them.
                    let sector = (round * 8 + queue + n * 4) % 800;
                    machine.submit(queue as usize, &Ask::write(sector, vec![round as u8; 512]));
                }
            }
            machine.submit(0, &Ask::trim(T_DISCARD, round * 8, 64, 0));
            backend.rebind(maps[round as usize % 4]);
            assert_eq!(machine.wait_all(&backend), Waited::Answered);
        }
        let export = export(&backend);
        let found = map(&backend);
        let verification = &found["verification"];
        assert_eq!(verification["busy"], json!(0), "{engine}: {verification}");
        assert_eq!(found["touched"], json!(export.blocks.len()), "{engine}");
        assert!(export.blocks.len() > 40 && export.verified);
        blocks_are_true(&site, &export);
    }
}

#[test]
fn the_next_process_knows_which_blocks_were_used() {
    let site = Site::new(1 << 20);
    let file = format!("--map-file={}", site.path("touched").display());
    let mut first = site.start(&[&file]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    for block in [3u64, 77, 200] {
        assert_eq!(machine.ask(&first, &Ask::write(block * 8, vec![7; 4096])).status, 0);
    }
    first.kill();
    let second = site.start(&[&file]);
    assert_eq!(map(&second)["touched"], json!(3));
    let export = export(&second);
    assert_eq!(export.blocks.iter().map(|b| b.block).collect::<Vec<_>>(), [3, 77, 200]);
    blocks_are_true(&site, &export);
}

#[test]
fn the_map_of_a_large_disk_takes_what_is_touched_and_one_too_large_goes_without() {
    let tib = 1 << 40;
    for (size, mapped) in [(16 * tib, true), (4096 * tib * 1024, false)] {
        let site = Site::on_tmpfs(size);
        let file = site.path("touched");
        let backend = site.start(&[&format!("--map-file={}", file.display())]);
        let mut machine = Machine::new(1, 64);
        machine.connect(&site.socket()).unwrap();
        let last = (size - 4096) / 512;
        for sector in [0, last] {
            assert_eq!(machine.ask(&backend, &Ask::write(sector, vec![7; 4096])).status, 0);
            assert_eq!(machine.ask(&backend, &Ask::read(sector, 4096)).data, [7; 4096]);
        }
        let allocated = std::fs::metadata(&file).map_or(0, |found| found.blocks() * 512);
        if mapped {
            assert_eq!(map(&backend)["touched"], json!(2));
            assert_eq!(allocated, 3 * 4096, "the header, and a page for each end of the disk");
        } else {
            assert!(backend.status()["map"].is_null());
            assert_eq!(allocated, 0);
        }
    }
}

#[test]
fn a_verification_runs_in_the_background_and_a_small_index_says_what_it_left_out() {
    let site = Site::new(1 << 20);
    let backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    for block in 0..40 {
        assert_eq!(machine.ask(&backend, &Ask::read(block * 8, 4096)).status, 0);
    }
    let started = backend.control(&json!({"id": 1, "cmd": "map-verify", "index_bytes": 360}));
    assert_eq!(started["ok"]["started"], json!(true));
    let done = wait_until("the verification", || {
        Some(map(&backend)).filter(|map| map["running"].is_null())
    });
    let verification = &done["verification"];
    assert_eq!((&verification["indexed"], &verification["beyond_limit"]), (&json!(10), &json!(30)));
}

#[test]
fn without_a_map_and_without_sense_the_remedy_is_told() {
    let site = Site::new(1 << 20);
    let backend = site.start(&["--no-map"]);
    let refused = backend.control(&json!({"id": 1, "cmd": "map"}));
    assert!(refused["error"]["message"].as_str().unwrap().contains("--no-map"), "{refused}");
    assert!(backend.status()["map"].is_null());
    drop(backend);
    let backend = site.start(&[]);
    let mut machine = Machine::new(1, 64);
    machine.connect(&site.socket()).unwrap();
    for (request, word) in [
        (json!({"cmd": "map-find"}), "address"),
        (json!({"cmd": "map-find", "address": u64::MAX}), "no guest memory"),
        (json!({"cmd": "map-nonsense"}), "map-nonsense"),
    ] {
        let refused = backend.control(&request);
        assert!(refused["error"]["message"].as_str().unwrap().contains(word), "{refused}");
    }
    let found = backend.control(&json!({"cmd": "map-find", "sector": u64::MAX}));
    assert_eq!(found["ok"], json!({"addresses": []}));
}
