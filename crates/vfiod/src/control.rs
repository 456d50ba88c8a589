//! What the control socket is asked; see `semper_control` for how, `answers` for the answers.
//!
//! ```text
//!   {"cmd":"status"}
//!   {"cmd":"configuration"}                   what a destination's QEMU is to write
//!   {"cmd":"msix","address":A,"table":"hex"}  has QEMU write the table of vectors
//!   {"cmd":"capture","on":true}               from now on pages are tracked, "dirty" says how, and
//!                                             writes of registers noted
//!   {"cmd":"round"}, {"cmd":"replay","writes":"…"}   what was noted; to the destination's registers
//!   {"cmd":"quiesce"}                         takes no command, ends those that it has, no interrupts
//!   {"cmd":"touch"}                           QEMU is to know every page that was written directly
//!   {"cmd":"export"}, {"cmd":"import","state":"…"}   the device's whole state
//!   {"cmd":"release"}, {"cmd":"claim",…}      the image
//!   {"cmd":"resume"}                          goes on, here or at the destination
//! ```
//!
//! Each can be asked again: what is so already is answered alike.

use semper_control::Answer;
use semper_device::capture;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::inbox::Teller;

/// Which pages a move's destination gets to know of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Dirty {
    /// QEMU writes, and knows.
    #[default]
    Mediated,
    /// They are noted, and touched once the VM stands still.
    Touch,
    /// Of none: a control, which loses pages.
    None,
}

/// Which registers count at a destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Registers {
    /// Those of the state.
    #[default]
    Exported,
    /// Those that were replayed.
    Replayed,
}

/// One line.
#[derive(Debug, Deserialize)]
pub(crate) struct Request {
    #[serde(default)]
    pub id: Value,
    pub cmd: String,
    pub on: Option<bool>,
    #[serde(default)]
    pub dirty: Dirty,
    pub address: Option<u64>,
    pub table: Option<String>,
    pub writes: Option<String>,
    pub state: Option<String>,
    #[serde(default)]
    pub registers: Registers,
    pub epoch: Option<u64>,
    pub claim: Option<String>,
}

/// Why a command is not carried out: for programs, and for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal(pub &'static str, pub String);

/// It makes no sense, now or later.
pub(crate) fn invalid(why: impl Into<String>) -> Refusal {
    Refusal("invalid", why.into())
}

/// Not in this state.
pub(crate) fn busy(why: impl Into<String>) -> Refusal {
    Refusal("busy", why.into())
}

/// It was begun.
pub(crate) fn failed(why: impl Into<String>) -> Refusal {
    Refusal("failed", why.into())
}

/// Has the device's thread answer a line.
pub(crate) fn answer(teller: &Teller, line: &str) -> Answer {
    let request: Request = match serde_json::from_str(line) {
        Ok(request) => request,
        Err(error) => {
            let why = format!("not a request: {error}");
            return Answer::refused(&Value::Null, "invalid", why);
        }
    };
    let id = request.id.clone();
    let ending = || Answer::refused(&id, "busy", "this process is ending");
    teller.ask(request).unwrap_or_else(ending)
}

/// Bytes as hexadecimal digits.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of hexadecimal digits; `None` for anything else.
pub(crate) fn from_hex(text: &str) -> Option<Vec<u8>> {
    if text.len() % 2 != 0 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let pair = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).ok();
    (0..text.len()).step_by(2).map(pair).collect()
}

/// What a round has given.
///
/// # Errors
/// [`Refusal`]: it is none.
pub(crate) fn writes(text: &str) -> Result<Vec<capture::Write>, Refusal> {
    serde_json::from_str(text).map_err(|error| invalid(format!("these are no writes: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_goes_both_ways() {
        assert_eq!(to_hex(&[0, 0xab, 0xff]), "00abff");
        assert_eq!(from_hex("00abFF"), Some(vec![0, 0xab, 0xff]));
        assert_eq!((from_hex("0"), from_hex("0g"), from_hex("é")), (None, None, None));
        assert_eq!(from_hex(""), Some(Vec::new()));
    }

    #[test]
    fn what_was_noted_is_read_as_it_was_written() {
        let noted = vec![capture::Write { offset: 0x1008, size: 4, value: 7 }];
        let text = serde_json::to_string(&noted).unwrap();
        assert_eq!(writes(&text).unwrap(), noted);
        assert_eq!(writes("{}").unwrap_err().0, "invalid");
    }
}
