//! The comparison with golden files, and that none of the files is idle.

use std::fs;
use std::path::Path;

use semper_control::golden::{differences, folder};
use serde_json::{Value, json};

#[test]
fn values_may_differ_and_nothing_else() {
    let golden = json!({"a": 1, "b": {"c": "x", "d": null}, "e": [{"f": 1.5}], "g": []});
    let same = json!({"a": 7, "b": {"c": "", "d": null}, "e": [{"f": 0.5}, {"f": 2.0}], "g": []});
    assert_eq!(differences(&golden, &same), Vec::<String>::new());
    let changed = |pointer: &str, value: Value| {
        let mut told = golden.clone();
        *told.pointer_mut(pointer).unwrap() = value;
        differences(&golden, &told)
    };
    assert_eq!(
        changed("/a", json!(1.5)),
        ["/a: a number with a fraction instead of a whole number"]
    );
    assert_eq!(changed("/a", json!(null)), ["/a: null instead of a whole number"]);
    assert_eq!(changed("/b/d", json!("y")), ["/b/d: a string instead of null"]);
    assert_eq!(changed("/b", json!({"c": "x"})), ["/b/d: missing"]);
    assert_eq!(changed("/e", json!([{"f": 1.5}, {"f": 1}])).len(), 1);
    assert_eq!(changed("/e", json!([])).len(), 1);
    assert_eq!(changed("/g", json!([1])).len(), 1);
    let new = changed("/e/0", json!({"f": 1.5, "h": 0}));
    assert_eq!(new, ["/e/0/h: new; add it to the golden file"]);
}

fn sources(folder: &Path, into: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push_str(&fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn each_golden_file_is_held_against_its_program() {
    let mut text = String::new();
    sources(&folder().join("../.."), &mut text);
    for entry in fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let name = path.file_stem().unwrap().to_str().unwrap();
            assert!(text.contains(&format!("\"{name}\"")), "no test looks at {}", path.display());
        }
    }
}
