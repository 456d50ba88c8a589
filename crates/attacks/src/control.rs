//! A local client against the control socket.

use std::cell::OnceCell;

use semper_blkd::hostile::Target;
use serde_json::Value;
use tempfile::NamedTempFile;

thread_local!(static TARGET: OnceCell<(Target, NamedTempFile)> = const { OnceCell::new() });

/// Every line has an answer: a JSON object that is either `ok` or an `error` with kind and message.
pub fn control(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    TARGET.with(|target| {
        let (target, _) = target.get_or_init(|| {
            let image = NamedTempFile::new().expect("a file for the image");
            image.as_file().set_len(1 << 20).expect("room for the image");
            (Target::new(image.path(), false, 2), image)
        });
        for line in text.lines().take(32) {
            let answer = target.control(line);
            assert!(!answer.contains('\n'), "an answer of several lines");
            let answer: Value = serde_json::from_str(&answer).expect("JSON");
            let error = &answer["error"];
            let is_error = error["kind"].is_string() && error["message"].is_string();
            assert!(answer["ok"].is_object() != is_error, "{answer}");
        }
    });
}
