// SPDX-License-Identifier: Apache-2.0 OR MIT
//! TLS for NBD (proto.md, "TLS support"): X.509 credentials, and who may come in with them.
//!
//! Keys and certificates come as bytes: whoever has them has read them from passed descriptors.

use std::io;
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};

use super::name;

pub use super::name::subject as distinguished_name;

/// What a server proves itself with, and what it checks clients by: the content of PEM files.
#[derive(Clone, Debug, Default)]
pub struct Pem {
    /// The authorities that clients' certificates must come from.
    pub ca_cert: Vec<u8>,
    /// What the authorities have revoked; may be empty.
    pub ca_crl: Vec<u8>,
    /// The server's certificate, and those between it and its authority.
    pub server_cert: Vec<u8>,
    /// Its key, not encrypted: PKCS #8, PKCS #1 or SEC 1.
    pub server_key: Vec<u8>,
}

/// Checked credentials of a server. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Credentials {
    config: Arc<ServerConfig>,
    verifies_peer: bool,
}

impl Credentials {
    /// Credentials of a server; with `verify_peer` clients must show a certificate of its authorities.
    ///
    /// # Errors
    /// A sentence: what is missing, malformed, or does not fit together.
    pub fn x509(pem: &Pem, verify_peer: bool) -> Result<Credentials, String> {
        let provider = Arc::new(ring::default_provider());
        let chain = certificates(&pem.server_cert, "server certificate")?;
        let key = PrivateKeyDer::from_pem_slice(&pem.server_key)
            .map_err(|e| format!("the server key is no unencrypted private key in PEM: {e}"))?;
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?;
        let builder = if verify_peer {
            let mut roots = RootCertStore::empty();
            for authority in certificates(&pem.ca_cert, "CA certificate")? {
                roots.add(authority).map_err(|e| format!("the CA certificate cannot be used: {e}"))?;
            }
            let revoked = CertificateRevocationListDer::pem_slice_iter(&pem.ca_crl)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|e| format!("the certificate revocation list is no PEM: {e}"))?;
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
                .with_crls(revoked)
                .build()
                .map_err(|e| format!("the CA certificate cannot be used: {e}"))?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let mut config = builder
            .with_single_cert(chain, key)
            .map_err(|e| format!("the server certificate and its key cannot be used: {e}"))?;
        // An NBD connection lives long: nothing is kept to resume it by.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Credentials { config: Arc::new(config), verifies_peer: verify_peer })
    }

    /// Whether clients must show a certificate.
    pub fn verifies_peer(&self) -> bool {
        self.verifies_peer
    }

    pub(super) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }
}

fn certificates(pem: &[u8], what: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match parsed {
        Ok(certificates) if certificates.is_empty() => Err(format!("there is no {what} in PEM")),
        Ok(certificates) => Ok(certificates),
        Err(e) => Err(format!("the {what} is no PEM: {e}")),
    }
}

/// Whether the client whose certificate has this distinguished name may come in.
pub type Authorization = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// TLS as a server wants it.
#[derive(Clone)]
pub struct Tls {
    /// Who the server is.
    pub credentials: Credentials,
    /// Who may come in; `None` is everybody whose certificate is good. Wants credentials that verify peers.
    pub authorization: Option<Authorization>,
}

impl Tls {
    /// Whether the client with this certificate (DER) may come in.
    pub(super) fn authorize(&self, certificate: Option<&[u8]>) -> io::Result<()> {
        let Some(allows) = &self.authorization else { return Ok(()) };
        let name = certificate.and_then(name::subject);
        match name {
            Some(name) if allows(&name) => Ok(()),
            Some(name) => Err(denied(&format!("TLS x509 authz check for {name} is denied"))),
            None => Err(denied("the client's certificate has no name to go by")),
        }
    }
}

fn denied(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, why)
}
