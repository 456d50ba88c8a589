//! Requests that fail on demand, in builds for tests; nothing at all in others: whoever reaches the
//! control socket of a released backend can have no write answered that was not carried out.

#[cfg(feature = "faults")]
pub(crate) use armed::{Faults, Rule};

#[cfg(not(feature = "faults"))]
pub(crate) use absent::Faults;

#[cfg(not(feature = "faults"))]
mod absent {
    use semper_block::Engine;

    /// Faults that there are none of.
    #[derive(Clone, Default)]
    pub(crate) struct Faults(());

    impl Faults {
        /// The engine as it is.
        pub(crate) fn around<E: Engine>(&self, engine: E) -> E {
            engine
        }
    }
}

#[cfg(feature = "faults")]
mod armed {
    use std::time::Duration;

    use semper_block::{Engine, FaultEngine, FaultRule, FaultSwitch};
    use serde::Deserialize;

    const OPS: [&str; 6] = ["any", "read", "write", "flush", "discard", "write-zeroes"];

    /// What the command `fault` takes; see `FaultRule`.
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(crate) struct Rule {
        op: Option<String>,
        errno: Option<String>,
        #[serde(default)]
        every: u64,
        #[serde(default)]
        limit: u64,
        #[serde(default)]
        delay_ms: u64,
    }

    /// The switch of all engines of one disk.
    #[derive(Clone, Default)]
    pub(crate) struct Faults(FaultSwitch);

    impl Faults {
        /// An engine that fails requests by the rule that is in force.
        pub(crate) fn around<E: Engine>(&self, engine: E) -> FaultEngine<E> {
            FaultEngine::new(engine, self.0.clone())
        }

        /// Puts a rule into force, or none. Returns what is wrong with it.
        pub(crate) fn set(&self, rule: Option<Rule>) -> Result<(), String> {
            let rule = rule.map(Rule::checked).transpose()?;
            log::warn!("fault injection rule={rule:?}");
            self.0.set(rule);
            Ok(())
        }
    }

    impl Rule {
        fn checked(self) -> Result<FaultRule, String> {
            if let Some(op) = &self.op
                && !OPS.contains(&op.as_str())
            {
                return Err(format!("unknown operation {op:?}; known are {OPS:?}"));
            }
            let errno = match self.errno.as_deref() {
                None => None,
                Some("OK") => Some(0),
                Some("EIO") => Some(libc::EIO),
                Some("ENOSPC") => Some(libc::ENOSPC),
                Some("EDQUOT") => Some(libc::EDQUOT),
                Some("EROFS") => Some(libc::EROFS),
                Some("ETIMEDOUT") => Some(libc::ETIMEDOUT),
                Some(other) => {
                    return Err(format!(
                        "unknown errno {other:?}; known are OK, EIO, ENOSPC, EDQUOT, EROFS, \
                         ETIMEDOUT"
                    ));
                }
            };
            Ok(FaultRule {
                op: self.op.filter(|op| op != "any"),
                errno,
                every: self.every,
                limit: self.limit,
                delay: Duration::from_millis(self.delay_ms),
            })
        }
    }
}
