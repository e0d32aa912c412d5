// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `metrics-server-start`, `metrics-server-stop`.

use qmp::{Arguments, Call, Command, Error, Member, Type};
use serde::Deserialize;
use serde_json::Value;

use crate::metrics::Server;
use crate::state::Daemon;

pub fn commands() -> Vec<Command<Daemon>> {
    vec![
        Command::new(
            "metrics-server-start",
            "Answers scrapers of OpenMetrics (HTTP, `GET /metrics`) on a listening socket that was passed with `getfd`.",
            [Member::required("addr", Type::Named("SocketAddressLegacy"), "The socket: `type` must be `fd`.")],
            start,
        ),
        Command::new("metrics-server-stop", "Closes that socket.", Arguments::NONE, stop),
    ]
}

#[derive(Deserialize)]
struct Start {
    addr: Value,
}

fn start(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let Start { addr } = call.parse()?;
    if daemon.metrics.is_running() {
        return Err(Error::generic("Metrics server already running"));
    }
    let kind = addr["type"].as_str().unwrap_or_default();
    if kind != "fd" {
        return Err(Error::generic(format!(
            "Could not listen on a socket of type '{kind}': this daemon binds nothing; pass a listening socket with getfd \
             and give {{\"type\": \"fd\", \"data\": {{\"str\": NAME}}}}"
        )));
    }
    let listener = daemon.named_fds().take(addr["data"]["str"].as_str().unwrap_or_default())?;
    if !rustix::net::sockopt::socket_acceptconn(&listener).unwrap_or(false) {
        return Err(Error::generic("The passed descriptor is not a listening socket"));
    }
    let server = Server::start(listener, daemon.wake());
    let server = server.map_err(|e| Error::generic(format!("Could not start the metrics server: {e}")))?;
    daemon.metrics.put(server);
    Ok(Value::Null)
}

fn stop(daemon: &mut Daemon, _: Call<'_>) -> Result<Value, Error> {
    if daemon.metrics.stop() { Ok(Value::Null) } else { Err(Error::generic("Metrics server not running")) }
}
