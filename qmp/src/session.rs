// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What one client has negotiated, and what is to be answered to what it sends. A state machine without I/O.
//!
//! A session starts with the [greeting](Session::greeting) and knows only `qmp_capabilities` until that succeeds.
//! Messages are [accepted](Session::accept) into a queue and answered in order by [`step`](Session::step), one at a
//! time, so that a server can take turns among its clients; [`dispatch`](Session::dispatch) does both. A command that
//! asks to be run out of band overtakes the queue.

use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::{Error, ErrorClass, Message, PendingFds, Table, order, output};

/// In-band commands that may wait once out-of-band execution is on, as in QEMU. Without it, one waits.
const QUEUE: usize = 8;

/// One client's session.
#[derive(Debug, Default)]
pub struct Session {
    pretty: bool,
    negotiated: bool,
    oob: bool,
    queue: VecDeque<Message>,
    pending: PendingFds,
}

impl Session {
    /// A session that has not negotiated; `pretty` spreads its output over indented lines.
    pub fn new(pretty: bool) -> Session {
        Session { pretty, ..Session::default() }
    }

    /// What goes out first. Out-of-band execution is always on offer.
    pub fn greeting<S>(&self, table: &Table<S>) -> Vec<u8> {
        let hello = json!({ "QMP": { "version": table.version.to_value(), "capabilities": ["oob"] } });
        output::line(&hello, self.pretty)
    }

    /// Whether the client has negotiated, and so gets events.
    pub fn negotiated(&self) -> bool {
        self.negotiated
    }

    /// Whether the next message may be accepted: QEMU reads no further than the command it runs, or with out-of-band
    /// execution until eight wait.
    pub fn wants_input(&self) -> bool {
        self.queue.len() < if self.oob { QUEUE } else { 1 }
    }

    /// Messages that wait for their answer.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Descriptors that came with earlier messages and that no command has claimed.
    pub fn pending(&mut self) -> &mut PendingFds {
        &mut self.pending
    }

    /// Numbers of those descriptors.
    pub fn unclaimed(&self) -> Vec<i32> {
        self.pending.numbers()
    }

    /// Takes a message in. The bytes are the answer to one that runs out of band, else empty.
    pub fn accept<S>(&mut self, table: &Table<S>, state: &mut S, message: Message) -> Vec<u8> {
        let out_of_band = matches!(&message.content, Ok(Value::Object(object))
            if object.contains_key("exec-oob") && !object.contains_key("execute"));
        if out_of_band {
            return self.answer(table, state, message);
        }
        self.queue.push_back(message);
        Vec::new()
    }

    /// Answers the oldest message that waits, if any does.
    pub fn step<S>(&mut self, table: &Table<S>, state: &mut S) -> Option<Vec<u8>> {
        let message = self.queue.pop_front()?;
        Some(self.answer(table, state, message))
    }

    /// Takes a message in and answers all that wait: the bytes to send.
    pub fn dispatch<S>(&mut self, table: &Table<S>, state: &mut S, message: Message) -> Vec<u8> {
        let mut answers = self.accept(table, state, message);
        while let Some(answer) = self.step(table, state) {
            answers.extend(answer);
        }
        answers
    }

    /// An event as this client is to see it; nothing before it has negotiated.
    pub fn event(&self, name: &str, data: Option<&Value>, when: SystemTime) -> Option<Vec<u8>> {
        self.negotiated.then(|| output::line(&event(name, data, when), self.pretty))
    }

    fn answer<S>(&mut self, table: &Table<S>, state: &mut S, message: Message) -> Vec<u8> {
        self.pending.replace(message.receipt);
        let mut id = None;
        let result = match message.content {
            Err(parse_error) => Err(Error::generic(parse_error)),
            Ok(Value::Object(mut object)) => {
                id = object.remove("id");
                self.run(table, state, object)
            }
            Ok(_) => Err(Error::generic("QMP input must be a JSON object")),
        };
        let mut answer = match result {
            Ok(Value::Null) => json!({ "return": {} }),
            Ok(value) => Value::Object(Map::from_iter([("return".to_owned(), value)])),
            Err(error) => json!({ "error": error.to_value() }),
        };
        if let (Some(id), Value::Object(answer)) = (id, &mut answer) {
            answer.insert("id".to_owned(), id);
        }
        output::line(&answer, self.pretty)
    }

    fn run<S>(&mut self, table: &Table<S>, state: &mut S, object: Map<String, Value>) -> Result<Value, Error> {
        let request = Request::read(object, self.oob)?;
        let Some(command) = table.command(&request.command) else {
            return Err(Error::command_not_found(if self.negotiated {
                format!("The command {} has not been found", request.command)
            } else {
                NEGOTIATE.to_owned()
            }));
        };
        let negotiates = command.name == "qmp_capabilities";
        if !self.negotiated && !negotiates {
            return Err(Error::command_not_found(NEGOTIATE));
        }
        if request.out_of_band && !command.oob {
            return Err(Error::generic(format!("The command {} does not support OOB", command.name)));
        }
        if negotiates {
            return self.negotiate(&table.checked(command, request.arguments)?);
        }
        table.run(state, &mut self.pending, command, request.arguments)
    }

    fn negotiate(&mut self, arguments: &Map<String, Value>) -> Result<Value, Error> {
        if self.negotiated {
            return Err(Error::new(
                ErrorClass::CommandNotFound,
                "Capabilities negotiation is already complete, command ignored",
            ));
        }
        // The only capability there is; the schema lets no other through.
        self.oob = arguments.get("enable").and_then(Value::as_array).is_some_and(|enable| !enable.is_empty());
        self.negotiated = true;
        Ok(Value::Null)
    }
}

const NEGOTIATE: &str = "Expecting capabilities negotiation with 'qmp_capabilities'";

/// The outer members of a command.
struct Request {
    command: String,
    arguments: Map<String, Value>,
    out_of_band: bool,
}

impl Request {
    /// Looks at the members in QEMU's order, so that the first mistake is QEMU's first.
    fn read(object: Map<String, Value>, oob: bool) -> Result<Request, Error> {
        let mut members: Vec<_> = object.into_iter().collect();
        members.sort_by_key(|(key, _)| order::chain(key));
        let mut command: Option<(String, String)> = None;
        let mut arguments = Map::new();
        for (key, value) in members {
            match (key.as_str(), value) {
                ("execute", value) => Self::name(&mut command, key, value)?,
                ("exec-oob", value) if oob => Self::name(&mut command, key, value)?,
                ("arguments", Value::Object(given)) => arguments = given,
                ("arguments", _) => return Err(Error::generic("QMP input member 'arguments' must be an object")),
                _ => return Err(Error::generic(format!("QMP input member '{key}' is unexpected"))),
            }
        }
        let (key, command) = command.ok_or_else(|| Error::generic("QMP input lacks member 'execute'"))?;
        Ok(Request { command, arguments, out_of_band: key == "exec-oob" })
    }

    fn name(command: &mut Option<(String, String)>, key: String, value: Value) -> Result<(), Error> {
        let Value::String(name) = value else {
            return Err(Error::generic(format!("QMP input member '{key}' must be a string")));
        };
        if let Some((other, _)) = command {
            return Err(Error::generic(format!("QMP input member '{key}' clashes with '{other}'")));
        }
        *command = Some((key, name));
        Ok(())
    }
}

/// An event on one line, as every negotiated client without pretty output sees it.
pub fn event_line(name: &str, data: Option<&Value>, when: SystemTime) -> Vec<u8> {
    output::line(&event(name, data, when), false)
}

fn event(name: &str, data: Option<&Value>, when: SystemTime) -> Value {
    let since = when.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut event = json!({
        "timestamp": { "seconds": since.as_secs(), "microseconds": since.subsec_micros() },
        "event": name,
    });
    if let (Some(data), Value::Object(event)) = (data, &mut event) {
        event.insert("data".to_owned(), data.clone());
    }
    event
}
