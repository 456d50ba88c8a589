//! One message of the front end, from its first sight to its answer.
//!
//! ```text
//!   see ── begin ── handle ── tell the spares ── taking ── take ── answering ── answer ── done
//! ```
//!
//! The process can die between any two of these steps, and a spare goes on ([`super::resume`]).
//! So the message stays in the connection until the spares know it, and the spares know it before
//! it is answered: whoever comes finds each message in one of the two places, or in both. To
//! handle a message a second time does no harm.

use crate::message::Message;

/// What happens to a message. Each step is one system call, or none, as far as others can see.
pub(crate) trait Steps {
    /// Why the connection has to end.
    type Error;

    /// The next message, which stays where it is.
    fn see(&mut self) -> Result<Message, Self::Error>;
    /// Shows that a message is in hand; gives its number.
    fn begin(&mut self) -> u64;
    /// Carries it out. The answer may say that this failed; then the connection ends behind it.
    fn handle(&mut self, message: &Message) -> (Message, Result<(), Self::Error>);
    /// Tells the spares.
    fn tell(&mut self, message: &Message, answer: &Message);
    /// Shows that the message is no longer in the connection for sure.
    fn taking(&mut self, number: u64);
    /// Takes the message from the connection.
    fn take(&mut self, message: &Message) -> Result<(), Self::Error>;
    /// Puts the answer into the outbox, unless it has files, and shows that it goes out.
    fn answering(&mut self, number: u64, answer: &Message) -> Result<(), Self::Error>;
    /// Sends it.
    fn answer(&mut self, answer: &Message) -> Result<(), Self::Error>;
    /// Shows that nothing is in hand.
    fn done(&mut self, number: u64);
}

/// Waits for a message and does all that is to be done with it.
///
/// # Errors
/// Why the connection has to end.
pub(crate) fn serve_one<S: Steps>(steps: &mut S) -> Result<(), S::Error> {
    let message = steps.see()?;
    let number = steps.begin();
    let (answer, handled) = steps.handle(&message);
    if handled.is_err() {
        // The message stays: a spare that goes on now comes to the same end, or ends at once what
        // was refused.
        if !answer.is_empty() {
            steps.answering(number, &answer)?;
            steps.answer(&answer)?;
        }
        return handled;
    }
    steps.tell(&message, &answer);
    steps.taking(number);
    steps.take(&message)?;
    give_answer(steps, number, &answer)
}

/// Gives the answer to a message that was taken.
///
/// # Errors
/// The connection's.
pub(crate) fn give_answer<S: Steps>(
    steps: &mut S,
    number: u64,
    answer: &Message,
) -> Result<(), S::Error> {
    if !answer.is_empty() {
        steps.answering(number, answer)?;
        steps.answer(answer)?;
    }
    steps.done(number);
    Ok(())
}
