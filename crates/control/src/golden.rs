//! For tests: whether what a program tells still looks like its golden file. `golden/README.md` says
//! what these files are.

use std::path::PathBuf;

use serde_json::{Map, Value};

/// Where the files are.
pub fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden")
}

/// Holds `told` against the file `NAME.json`: the same keys, and the same types at each of them.
/// Values may differ.
///
/// # Panics
/// When there is no such file, or when it looks different.
pub fn check(name: &str, told: &Value) {
    let path = folder().join(name).with_extension("json");
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}; it could be {told:#}", path.display()));
    let golden =
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let differences = differences(&golden, told);
    let list = differences.join("\n  ");
    assert!(differences.is_empty(), "{name} is not as in its golden file:\n  {list}\n{told:#}");
}

/// Where `told` is not built like `golden`. Elements of an array are all like the golden one's
/// first; a number with a fraction is another type than one without.
pub fn differences(golden: &Value, told: &Value) -> Vec<String> {
    let mut found = Vec::new();
    compare("", golden, told, &mut found);
    found
}

fn compare(at: &str, golden: &Value, told: &Value, found: &mut Vec<String>) {
    let place = if at.is_empty() { "/" } else { at };
    match (golden, told) {
        (Value::Object(golden), Value::Object(told)) => compare_keys(at, golden, told, found),
        (Value::Array(golden), Value::Array(told)) => match golden.first() {
            None if told.is_empty() => {}
            None => found.push(format!("{place}: the golden array is empty, this one is not")),
            Some(_) if told.is_empty() => {
                found.push(format!(
                    "{place}: this array is empty, and tells nothing of its elements"
                ));
            }
            Some(golden) => {
                for (index, told) in told.iter().enumerate() {
                    compare(&format!("{at}/{index}"), golden, told, found);
                }
            }
        },
        _ if kind(golden) == kind(told) => {}
        _ => found.push(format!("{place}: {} instead of {}", kind(told), kind(golden))),
    }
}

fn compare_keys(
    at: &str,
    golden: &Map<String, Value>,
    told: &Map<String, Value>,
    found: &mut Vec<String>,
) {
    for (key, golden) in golden {
        match told.get(key) {
            Some(told) => compare(&format!("{at}/{key}"), golden, told, found),
            None => found.push(format!("{at}/{key}: missing")),
        }
    }
    let new = told.keys().filter(|key| !golden.contains_key(*key));
    found.extend(new.map(|key| format!("{at}/{key}: new; add it to the golden file")));
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(number) if number.is_f64() => "a number with a fraction",
        Value::Number(_) => "a whole number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
