//! The wire: JSON lines, one request or reply a line.
//!
//! ```text
//!   host -> guest  {"id":1,"cmd":"ping", …arguments…}
//!   guest -> host  {"id":1,"ok":{…}}  or  {"id":1,"error":{"kind":"invalid|unavailable|failed","message":"…"}}
//!   guest -> host  {"event":"hello", …}
//! ```

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// Why a command was not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    kind: &'static str,
    message: String,
}

impl Failure {
    /// The request makes no sense: repeat it and it fails again.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self { kind: "invalid", message: message.into() }
    }

    /// Not done, because of the state that the probe is in.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self { kind: "unavailable", message: message.into() }
    }

    /// Tried, and the kernel said no.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { kind: "failed", message: message.into() }
    }

    /// What went wrong, for a person.
    pub fn message(&self) -> &str {
        &self.message
    }
}

/// What a command came to.
pub type Answer = Result<Value, Failure>;

/// One request.
#[derive(Debug, PartialEq)]
pub struct Request {
    /// Comes back with the reply.
    pub id: Value,
    /// The command's name.
    pub cmd: String,
    arguments: Map<String, Value>,
}

impl Request {
    /// Reads one line. The error carries the id, if one could be read.
    pub fn parse(line: &[u8]) -> Result<Self, (Value, Failure)> {
        let value = serde_json::from_slice(line)
            .map_err(|error| (Value::Null, Failure::invalid(format!("not JSON: {error}"))))?;
        let Value::Object(mut arguments) = value else {
            return Err((Value::Null, Failure::invalid("a request is a JSON object")));
        };
        let id = arguments.remove("id").unwrap_or(Value::Null);
        match arguments.remove("cmd") {
            Some(Value::String(cmd)) => Ok(Self { id, cmd, arguments }),
            _ => Err((id, Failure::invalid("a request has a string \"cmd\""))),
        }
    }

    /// Reads the arguments of the command.
    pub fn arguments<T: DeserializeOwned>(&mut self) -> Result<T, Failure> {
        let arguments = Value::Object(std::mem::take(&mut self.arguments));
        serde_json::from_value(arguments)
            .map_err(|error| Failure::invalid(format!("{}: {error}", self.cmd)))
    }
}

/// The reply to a request, without the end of line.
pub fn reply(id: &Value, answer: Answer) -> Value {
    match answer {
        Ok(ok) => json!({"id": id, "ok": ok}),
        Err(failure) => {
            json!({"id": id, "error": {"kind": failure.kind, "message": failure.message}})
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Since {
        #[serde(default)]
        since_ns: u64,
    }

    #[test]
    fn a_request_carries_its_arguments_beside_the_command() {
        let mut request = Request::parse(br#"{"id":4,"cmd":"gaps","since_ns":9}"#).unwrap();
        assert_eq!((request.cmd.as_str(), &request.id), ("gaps", &json!(4)));
        assert_eq!(request.arguments(), Ok(Since { since_ns: 9 }));
    }

    #[test]
    fn what_is_malformed_is_answered() {
        let (id, failure) = Request::parse(b"{nonsense").unwrap_err();
        assert_eq!(id, Value::Null);
        assert!(failure.message().starts_with("not JSON"));
        let (id, _) = Request::parse(br#"{"id":"x","cmd":7}"#).unwrap_err();
        assert_eq!(id, json!("x"));
        let mut request = Request::parse(br#"{"id":1,"cmd":"gaps","sinse":1}"#).unwrap();
        let failure = request.arguments::<Since>().unwrap_err();
        assert!(failure.message().contains("unknown field `sinse`"), "{}", failure.message());
    }

    proptest! {
        #[test]
        fn no_line_ends_the_probe(line in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Request::parse(&line);
        }
    }
}
