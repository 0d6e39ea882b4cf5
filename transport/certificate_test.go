package transport

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"math/big"
	"testing"
	"time"
)

func TestSelfSigned(t *testing.T) {
	key, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	first, err := selfSigned(key)
	if err != nil {
		t.Fatal(err)
	}
	second, err := selfSigned(key)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first.Certificate[0], second.Certificate[0]) {
		t.Error("the same key made two certificates")
	}
	got, err := remotePublicKey(first.Certificate)
	if err != nil || got != key.Public() {
		t.Fatalf("%v, %v", got, err)
	}
	leaf, err := x509.ParseCertificate(first.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := leaf.CheckSignature(x509.PureEd25519, leaf.RawTBSCertificate, leaf.Signature); err != nil {
		t.Errorf("signature: %v", err)
	}
	if leaf.SerialNumber.Sign() <= 0 || leaf.NotAfter.Before(time.Now().AddDate(100, 0, 0)) || leaf.NotBefore.After(time.Now().AddDate(-1, 0, 0)) {
		t.Errorf("serial %v, from %v to %v", leaf.SerialNumber, leaf.NotBefore, leaf.NotAfter)
	}
	if bytes.Contains(first.Certificate[0], key[:]) {
		t.Error("the private key is in the certificate")
	}
}

func TestRemotePublicKeyRefuses(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	for name, chain := range map[string][][]byte{
		"nothing": nil, "empty": {{}}, "garbage": {[]byte("garbage")}, "ECDSA": {der},
	} {
		if _, err := remotePublicKey(chain); !errors.Is(err, errNoPublicKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
