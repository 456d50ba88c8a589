//! Mutual TLS 1.3: each end proves that it is a host of the same authority, and the one expected.

use std::path::Path;
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection,
};
use webpki::EndEntityCert;

use crate::args::EndArgs;
use crate::failure::Failure;

/// Certificates of this end, and whom it trusts.
pub(crate) struct Identity {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    peer: ServerName<'static>,
}

fn tls(error: impl std::fmt::Display) -> Failure {
    Failure::Tls(error.to_string())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let unreadable = |error| Failure::Tls(format!("no certificate in {}: {error}", path.display()));
    CertificateDer::pem_file_iter(path).map_err(unreadable)?.collect::<Result<_, _>>().map_err(
        |error| Failure::Tls(format!("a certificate in {} is damaged: {error}", path.display())),
    )
}

impl Identity {
    pub(crate) fn load(args: &EndArgs) -> Result<Self, Failure> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&args.ca)? {
            roots.add(certificate).map_err(tls)?;
        }
        let key = PrivateKeyDer::from_pem_file(&args.key).map_err(|error| {
            Failure::Tls(format!("no private key in {}: {error}", args.key.display()))
        })?;
        let peer = ServerName::try_from(args.peer_name.clone())
            .map_err(|error| Failure::Usage(format!("--peer-name {}: {error}", args.peer_name)))?;
        Ok(Self { roots: Arc::new(roots), chain: certificates(&args.cert)?, key, peer })
    }

    /// The source's side.
    pub(crate) fn client(&self) -> Result<Connection, Failure> {
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_root_certificates(Arc::clone(&self.roots))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(tls)?;
        let connection = ClientConnection::new(Arc::new(config), self.peer.clone()).map_err(tls)?;
        Ok(connection.into())
    }

    /// The destination's side.
    pub(crate) fn server(&self) -> Result<Arc<ServerConfig>, Failure> {
        let provider = Arc::new(ring::default_provider());
        let roots = Arc::clone(&self.roots);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider));
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_client_cert_verifier(verifier.build().map_err(tls)?)
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(tls)?;
        // One connection, never resumed.
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// A connection of the destination that is being set up.
    pub(crate) fn accept(config: &Arc<ServerConfig>) -> Result<Connection, Failure> {
        ServerConnection::new(Arc::clone(config)).map(Into::into).map_err(tls)
    }

    /// Whether the name in the source's certificate is the expected one. (rustls checks the name
    /// of a server itself, and that a client's certificate is of the authority.)
    pub(crate) fn check_client(&self, connection: &Connection) -> Result<(), Failure> {
        let chain = connection.peer_certificates().unwrap_or_default();
        let certificate = chain.first().ok_or_else(|| tls("the source showed no certificate"))?;
        let certificate = EndEntityCert::try_from(certificate).map_err(tls)?;
        certificate.verify_is_valid_for_subject_name(&self.peer).map_err(tls)
    }
}
